"""Mixture-of-experts ops: routing, capacity, and the expert products."""

from fulmen.kernels.moe.experts import grouped_swiglu
from fulmen.kernels.moe.router import Routing, drop_over_capacity, route

__all__ = ["Routing", "drop_over_capacity", "grouped_swiglu", "route"]
