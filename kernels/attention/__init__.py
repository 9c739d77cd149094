"""Causal softmax attention with grouped queries and packed documents."""

from fulmen.kernels.attention.op import softmax_attention

__all__ = ["softmax_attention"]
