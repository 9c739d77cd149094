"""SiLU and the split of a joint projection in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `silu_qkv`; in fp32 at least and rounded once."""
    accumulate = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    parts = F.silu(qkv.to(accumulate)).to(qkv.dtype)
    q, k, v = parts.unflatten(-1, (num_heads, 3, -1)).unbind(-2)
    return q.contiguous(), k.contiguous(), v.contiguous()
