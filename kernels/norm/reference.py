"""RMSNorm in plain torch."""

import torch
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` (arXiv:1910.07467, equation 4, with eps)."""
    return _normalise(_widen(x), weight, eps).to(x.dtype)


def deepnorm_reference(
    residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, alpha: float, beta: float
) -> Tensor:
    """`deepnorm`: post-norm of a scaled residual (arXiv:2203.00555), by RMS."""
    total = alpha * _widen(residual) + beta * _widen(update)
    return _normalise(total, weight, eps).to(residual.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_rms * weight.to(x.dtype)
