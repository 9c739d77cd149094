"""SwiGLU experts over tokens sorted by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Apply expert e's `w2 (silu(w1 x) * w3 x)` to its rows.

    Args:
        x: `[rows, hidden_size]`, sorted by expert.
        counts: `[num_experts]` int64 rows of each expert; rows after their sum get 0.
        w1, w3: `[num_experts, expert_hidden_size, hidden_size]`.
        w2: `[num_experts, hidden_size, expert_hidden_size]`.
    """
    # _grouped_mm wants rows that begin at multiples of 16 bytes.
    if x.is_cuda and x.dtype == torch.bfloat16 and w2.shape[1] % 8 == w2.shape[2] % 8 == 0:
        ends = counts.cumsum(0).to(torch.int32)
        # _grouped_mm leaves rows behind the last group unwritten, forward and backward.
        inside = (torch.arange(x.shape[0], device=x.device) < ends[-1]).unsqueeze(1)
        x = torch.where(inside, x, 0)
        gate = torch._grouped_mm(x, w1.transpose(1, 2), offs=ends)
        up = torch._grouped_mm(x, w3.transpose(1, 2), offs=ends)
        y = torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        return torch.where(inside, y, 0)
    sizes = counts.tolist()
    *parts, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
    # unbind, not w1[e]: the backward of an index would add a full-size zero tensor per expert.
    outputs = [
        F.linear(F.silu(F.linear(part, a)) * F.linear(part, b), c)
        for part, a, b, c in zip(parts, w1.unbind(), w3.unbind(), w2.unbind(), strict=True)
    ]
    return torch.cat([*outputs, torch.zeros_like(rest)])
