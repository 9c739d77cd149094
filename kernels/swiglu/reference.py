"""SwiGLU in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (arXiv:2002.05202), in fp32 at least and rounded once."""
    accumulate = accumulation_dtype(gate)
    return (F.silu(gate.to(accumulate)) * up.to(accumulate)).to(gate.dtype)
