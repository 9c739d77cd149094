"""RMSNorm times a sigmoid gate in plain torch."""

import torch
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm`: the output of lightning attention (arXiv:2501.08313, section 2.2)."""
    accumulate = accumulation_dtype(x)
    wide = x.to(accumulate)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse_rms * weight.to(accumulate)
    return (torch.sigmoid(gate.to(accumulate)) * normed).to(x.dtype)
