"""Rotary embedding of half of each query head."""

from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.rope import rope
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

THETA = 10_000_000.0


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(*MEMORY_BOUND_LENGTHS)]


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def case(tokens: int, settings: Settings) -> Case:
    """Each pass reads one tensor, writes one, and reads the tables.

    Not Liger's: it turns q and k together, in place.
    """
    heads, head_dim, half = settings.heads, settings.head_dim, settings.rotary_dim // 2

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        x, gradient = (random((1, tokens, heads, head_dim), device, dtype) for _ in range(2))
        rates = THETA ** -(torch.arange(half, device=device, dtype=torch.float64) / half)
        angles = torch.arange(tokens, device=device, dtype=torch.float64)[:, None] * rates
        return Inputs([x], (angles.cos().float(), angles.sin().float()), (gradient,))

    def fla() -> Any:
        from fla.modules.rotary import rotary_embedding

        return rotary_embedding

    tensor, tables = tokens * heads * head_dim * 2, 2 * tokens * half * 4
    return Case(
        op="rope",
        label=f"{tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: rows_truth(formula, inputs, axis=1),
        forward=Cost(2 * tensor + tables),
        training=Cost(4 * tensor + 2 * tables),
        providers=own_providers("rope", rope, settings) | rivals(settings, fla=fla),
    )
