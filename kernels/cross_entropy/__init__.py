"""Output head and cross entropy in one op that never holds all logits."""

from fulmen.kernels.cross_entropy.op import (
    linear_cross_entropy,
    summed_cross_entropy,
    token_cross_entropy,
)

__all__ = ["linear_cross_entropy", "summed_cross_entropy", "token_cross_entropy"]
