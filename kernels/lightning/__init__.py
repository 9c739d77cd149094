"""Lightning attention: linear attention with a constant decay per head."""

from fulmen.kernels.lightning.op import lightning_attention
from fulmen.kernels.lightning.part import (
    closing_state,
    combine_states,
    opening_gradient,
    part_backward_kv,
    part_backward_q,
    part_forward,
)

__all__ = [
    "closing_state",
    "combine_states",
    "lightning_attention",
    "opening_gradient",
    "part_backward_kv",
    "part_backward_q",
    "part_forward",
]
