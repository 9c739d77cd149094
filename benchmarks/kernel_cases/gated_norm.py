"""RMSNorm over all heads times a sigmoid gate."""

from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.gated_norm import gated_rms_norm
from kernel_cases.case import (
    EPS,
    MEMORY_BOUND_LENGTHS,
    Case,
    Cost,
    Inputs,
    Settings,
    own_providers,
    random,
    rivals,
    rows_truth,
)
from kernel_cases.norm import rms_norm_formula


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(*MEMORY_BOUND_LENGTHS)]


def case(tokens: int, settings: Settings) -> Case:
    """Forward reads two and writes one; backward reads three and writes two."""
    size = settings.heads * settings.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        x, gate, gradient = (random((tokens, size), device, dtype) for _ in range(3))
        return Inputs([x, gate, random((size,), device, dtype)], (), (gradient,))

    def formula(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return torch.sigmoid(gate) * rms_norm_formula(x, weight)

    def fla() -> Any:
        from fla.modules.fused_norm_gate import rms_norm_gated

        return lambda x, gate, weight: rms_norm_gated(x, gate, weight, None, "sigmoid", eps=EPS)

    tensor = tokens * size * 2
    return Case(
        op="gated_norm",
        label=f"{tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: rows_truth(formula, inputs, parameters=[2]),
        forward=Cost(3 * tensor),
        training=Cost(8 * tensor),
        providers=own_providers(
            "gated_norm", lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), settings
        )
        | rivals(settings, fla=fla),
    )
