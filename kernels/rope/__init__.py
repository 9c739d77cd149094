"""Rotary position embedding on part of each head."""

from fulmen.kernels.rope.op import rope

__all__ = ["rope"]
