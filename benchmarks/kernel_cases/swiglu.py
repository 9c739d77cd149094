"""SiLU of the gate times the up projection."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.swiglu import swiglu
from kernel_cases.case import (
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


def cases(settings: Settings) -> list[Case]:
    return [case(rows, settings) for rows in settings.lengths_or(*MEMORY_BOUND_LENGTHS)]


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def case(rows: int, settings: Settings) -> Case:
    """Forward reads two and writes one; backward reads three and writes two."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        gate, up, gradient = (random((rows, settings.inner), device, dtype) for _ in range(3))
        return Inputs([gate, up], (), (gradient,))

    def fla() -> Any:
        from fla.modules.activations import swiglu as call

        return call

    def liger() -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # Its backward pass writes over gate and up: the inputs are made anew for each provider.
        return LigerSiLUMulFunction.apply

    tensor = rows * settings.inner * 2
    return Case(
        op="swiglu",
        label=f"{rows}",
        tokens=rows,
        make=make,
        truth=lambda inputs: rows_truth(formula, inputs),
        forward=Cost(3 * tensor),
        training=Cost(8 * tensor),
        providers=own_providers("swiglu", swiglu, settings)
        | rivals(settings, liger_kernel=liger, fla=fla),
    )
