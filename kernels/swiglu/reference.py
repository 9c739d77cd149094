"""SwiGLU in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (arXiv:2002.05202), in fp32 at least and rounded once."""
    accumulate = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(accumulate)) * up.to(accumulate)).to(gate.dtype)
