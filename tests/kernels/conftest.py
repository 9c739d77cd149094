"""Fixtures of the tests of Triton kernels."""

from support.interpreter import compiled_for_hopper, poisoned_allocations

__all__ = ["compiled_for_hopper", "poisoned_allocations"]
