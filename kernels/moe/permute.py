"""Rows into the order of their experts and their weighted sum back: the public ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.kernels.common import NEEDS_CUDA, why_not_triton
from fulmen.kernels.moe.reference import (
    reference_permutation,
    reference_permute,
    reference_transpose_segments,
    reference_unpermute,
)
from fulmen.kernels.registry import choose


class Permutation(NamedTuple):
    """Assignments, (token, choice) pairs, sorted by expert; stable, dropped ones last."""

    destinations: Tensor
    """`[tokens, k]` int64 row of each assignment; one from `num_kept` on is dropped."""
    counts: Tensor
    """`[num_experts]` int64 rows of each expert, one after the other from row 0."""
    num_kept: Tensor
    """`[1]` int64 sum of `counts`."""


def permutation(experts: Tensor, num_experts: int) -> Permutation:
    """Sort the assignments of `experts` `[tokens, k]` int64; id `num_experts` means dropped.

    The host does not wait for the device.
    """
    if experts.dim() != 2 or experts.dtype != torch.int64:
        raise ValueError(
            "permutation: experts must be [tokens, k] int64, got "
            f"{tuple(experts.shape)} {experts.dtype}"
        )
    reason = "" if experts.is_cuda else NEEDS_CUDA
    if choose("permute", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.moe.triton_permute import triton_permutation

        return Permutation(*triton_permutation(experts, num_experts))
    return Permutation(*reference_permutation(experts, num_experts))


def permute(x: Tensor, order: Permutation) -> Tensor:
    """`[tokens, hidden_size]` to `[tokens * k, hidden_size]`: each token at its assignments' rows.

    Rows of dropped assignments are 0. The gradient is the sum over a token's rows in fixed order.
    """
    if x.dim() != 2 or x.shape[0] != order.destinations.shape[0]:
        raise ValueError(
            "permute: x must be [tokens, hidden_size] for the permutation's "
            f"{order.destinations.shape[0]} tokens, got {tuple(x.shape)}"
        )
    if choose("permute", ("triton", _why_not_rows(x)), ("torch", "")) == "triton":
        from fulmen.kernels.moe.triton_permute import triton_permute

        return triton_permute(x, order.destinations, order.num_kept)
    return reference_permute(x, order.destinations, order.num_kept)


def unpermute(rows: Tensor, weights: Tensor | None, order: Permutation) -> Tensor:
    """`[tokens * k, hidden_size]` to `[tokens, hidden_size]`: `sum_i weight_i * row_i` per token.

    Args:
        rows: by expert, as `permute` lays them. Those of dropped assignments are not read.
        weights: `[tokens, k]`, of dropped assignments ignored; None sums with weight 1.

    Returns:
        The sum in fp32 (fp64 for fp64 rows) over the choices in order, rounded to the rows' dtype.
    """
    tokens, k = order.destinations.shape
    if rows.dim() != 2 or rows.shape[0] != tokens * k:
        raise ValueError(
            f"unpermute: rows must be [{tokens * k}, hidden_size], got {tuple(rows.shape)}"
        )
    if weights is not None and weights.shape != (tokens, k):
        raise ValueError(f"unpermute: weights must be {(tokens, k)}, got {tuple(weights.shape)}")
    if choose("permute", ("triton", _why_not_rows(rows)), ("torch", "")) == "triton":
        from fulmen.kernels.moe.triton_permute import triton_unpermute

        return triton_unpermute(rows, weights, order.destinations, order.num_kept)
    return reference_unpermute(rows, weights, order.destinations, order.num_kept)


def transpose_segments(x: Tensor, sizes: Tensor) -> Tensor:
    """Rows sorted by an outer and then an inner key, sorted by the inner and then the outer one.

    Rows of a segment keep their order. With `sizes.t()` this is its own reverse, and its gradient.

    Args:
        x: `[rows, hidden_size]`; rows behind the last segment stay where they are.
        sizes: `[outer, inner]` int64 rows of each segment. The host does not learn them.
    """
    if x.dim() != 2 or sizes.dim() != 2 or sizes.dtype != torch.int64:
        raise ValueError(
            "transpose_segments: x must be [rows, hidden_size] and sizes [outer, inner] int64, got "
            f"{tuple(x.shape)}, {tuple(sizes.shape)} {sizes.dtype}"
        )
    if min(sizes.shape) == 1:
        return x  # one key does not sort at all
    if choose("permute", ("triton", _why_not_rows(x)), ("torch", "")) == "triton":
        from fulmen.kernels.moe.triton_segments import triton_transpose_segments

        return triton_transpose_segments(x, sizes)
    return reference_transpose_segments(x, sizes)


def _why_not_rows(x: Tensor) -> str:
    if reason := why_not_triton(x):
        return reason
    return "needs a hidden size that is a multiple of 8" if x.shape[1] % 8 else ""
