"""Causal softmax attention with grouped queries and packed documents."""

from fulmen.kernels.attention.block import Documents, attend_block, attend_block_backward
from fulmen.kernels.attention.merge import Merged, attend_behind
from fulmen.kernels.attention.op import softmax_attention

__all__ = [
    "Documents",
    "Merged",
    "attend_behind",
    "attend_block",
    "attend_block_backward",
    "softmax_attention",
]
