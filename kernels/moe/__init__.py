"""Mixture-of-experts ops: routing, capacity, order by expert, and the expert products."""

from fulmen.kernels.moe.experts import grouped_swiglu
from fulmen.kernels.moe.late_gradients import LateGradients, with_late_gradients
from fulmen.kernels.moe.permute import (
    Permutation,
    permutation,
    permute,
    transpose_segments,
    unpermute,
)
from fulmen.kernels.moe.router import Routing, drop_over_capacity, route

__all__ = [
    "LateGradients",
    "Permutation",
    "Routing",
    "drop_over_capacity",
    "grouped_swiglu",
    "permutation",
    "permute",
    "route",
    "transpose_segments",
    "unpermute",
    "with_late_gradients",
]
