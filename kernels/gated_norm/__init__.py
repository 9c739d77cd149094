"""RMSNorm times a sigmoid gate: what follows lightning attention."""

from fulmen.kernels.gated_norm.op import gated_rms_norm

__all__ = ["gated_rms_norm"]
