"""When a loss or a gradient norm is a spike, compared with those before it."""

import statistics
from collections.abc import Collection

LEAST = 20
"""Values before which nothing is compared."""
LOSS_SHARE = 0.01
"""Of the median: the least deviation that a loss is measured in."""


def highest_loss(seen: Collection[float], factor: float) -> float:
    """Above their median by `factor` median absolute deviations, of at least 1 % of it."""
    median = statistics.median(seen)
    deviation = statistics.median(abs(one - median) for one in seen)
    return median + factor * max(deviation, LOSS_SHARE * abs(median))


def highest_norm(seen: Collection[float], factor: float) -> float:
    """`factor` times their median."""
    return factor * statistics.median(seen)
