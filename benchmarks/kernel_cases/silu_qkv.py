"""SiLU on q, k and v with the split of the head-interleaved projection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.silu_qkv import silu_qkv
from kernel_cases.case import (
    MEMORY_BOUND_LENGTHS,
    Case,
    Cost,
    Inputs,
    Settings,
    own_providers,
    random,
    rows_truth,
)


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(*MEMORY_BOUND_LENGTHS)]


def case(tokens: int, settings: Settings) -> Case:
    """Forward reads one qkv and writes one; backward reads two and writes one."""
    heads, head_dim = settings.heads, settings.head_dim

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        qkv = random((1, tokens, 3 * heads * head_dim), device, dtype)
        gradients = (random((1, tokens, heads, head_dim), device, dtype) for _ in range(3))
        return Inputs([qkv], (), tuple(gradients))

    def formula(qkv: Tensor) -> tuple[Tensor, ...]:
        return F.silu(qkv).unflatten(-1, (heads, 3, head_dim)).unbind(-2)

    tensor = tokens * 3 * heads * head_dim * 2
    return Case(
        op="silu_qkv",
        label=f"{tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: rows_truth(formula, inputs, axis=1),
        forward=Cost(2 * tensor),
        training=Cost(5 * tensor),
        providers=own_providers("silu_qkv", lambda qkv: silu_qkv(qkv, heads), settings),
    )
