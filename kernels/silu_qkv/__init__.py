"""SiLU on the joint projection of q, k and v, and the split by head."""

from fulmen.kernels.silu_qkv.op import silu_qkv

__all__ = ["silu_qkv"]
