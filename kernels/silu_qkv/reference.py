"""SiLU and the split of a joint projection in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype


def reference_silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `silu_qkv`; in fp32 at least and rounded once."""
    accumulate = accumulation_dtype(qkv)
    parts = F.silu(qkv.to(accumulate)).to(qkv.dtype)
    q, k, v = parts.unflatten(-1, (num_heads, 3, -1)).unbind(-2)
    return q.contiguous(), k.contiguous(), v.contiguous()
