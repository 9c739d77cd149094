"""RMSNorm, alone or of the DeepNorm residual."""

from fulmen.kernels.norm.op import deepnorm, rms_norm

__all__ = ["deepnorm", "rms_norm"]
