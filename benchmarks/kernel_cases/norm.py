"""RMSNorm over the hidden size, alone and with the DeepNorm residual."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.norm import deepnorm, rms_norm
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


def rms_norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def cases(settings: Settings) -> list[Case]:
    lengths = settings.lengths_or(*MEMORY_BOUND_LENGTHS)
    return [make(tokens, settings) for make in (plain, residual) for tokens in lengths]


def plain(tokens: int, settings: Settings) -> Case:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    hidden = settings.hidden

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        x, gradient = (random((tokens, hidden), device, dtype) for _ in range(2))
        return Inputs([x, random((hidden,), device, dtype)], (), (gradient,))

    def fla() -> Any:
        from fla.modules.layernorm import rms_norm as call

        return lambda x, weight: call(x, weight, None, eps=EPS)

    def liger() -> Any:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # Its default writes dx over dy, which would be another function.
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def quack() -> Any:
        from quack import rmsnorm

        return lambda x, weight: rmsnorm(x, weight, eps=EPS)

    def native() -> Any:
        return lambda x, weight: F.rms_norm(x, (hidden,), weight, EPS)

    tensor = tokens * hidden * 2
    return Case(
        op="norm",
        label=f"rms_norm, {tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: rows_truth(rms_norm_formula, inputs, parameters=[1]),
        forward=Cost(2 * tensor),
        training=Cost(5 * tensor),
        providers=own_providers("norm", lambda x, weight: rms_norm(x, weight, EPS), settings)
        | rivals(settings, torch__rms_norm=native, liger_kernel=liger, fla=fla, quack=quack),
    )


def residual(tokens: int, settings: Settings) -> Case:
    """Forward reads two and writes one; backward reads three and writes two.

    The rivals add without factors, so that none of them computes it.
    """
    hidden = settings.hidden
    alpha, beta = (2 * settings.layers) ** 0.25, 1.0

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        x, update, gradient = (random((tokens, hidden), device, dtype) for _ in range(3))
        return Inputs([x, update, random((hidden,), device, dtype)], (), (gradient,))

    def call(x: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        return deepnorm(x, update, weight, EPS, alpha=alpha, beta=beta)

    def formula(x: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_formula(alpha * x + beta * update, weight)

    tensor = tokens * hidden * 2
    return Case(
        op="norm",
        label=f"deepnorm, {tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: rows_truth(formula, inputs, parameters=[2]),
        forward=Cost(3 * tensor),
        training=Cost(8 * tensor),
        providers=own_providers("norm", call, settings),
    )
