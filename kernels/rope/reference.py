"""Rotary position embedding in plain torch."""

import torch
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype


def reference_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Shapes as in `rope`; the rotation (arXiv:2104.09864, section 3.4.2) in fp32 at least."""
    accumulate = accumulation_dtype(x)
    half = cos.shape[-1]
    cos, sin = cos[:, None, :].to(accumulate), sin[:, None, :].to(accumulate)
    low, high = x[..., :half].to(accumulate), x[..., half : 2 * half].to(accumulate)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., 2 * half :]], dim=-1)
