"""Lightning attention: linear attention with a constant decay per head."""

from fulmen.kernels.lightning.op import lightning_attention

__all__ = ["lightning_attention"]
