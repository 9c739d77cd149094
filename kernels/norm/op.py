"""The public ops: argument checks, and the choice between Triton and the reference."""

from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.norm.plan import check_weight, unsupported
from fulmen.kernels.norm.reference import deepnorm_reference, rms_norm_reference
from fulmen.kernels.registry import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim.

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`, of any float type.

    Returns:
        Shaped and typed like `x`. Arithmetic is fp32 (fp64 for fp64), rounded once, at the end:
        for bf16, one rounding less than transformers' MiniMax norm, which rounds before the weight.
    """
    check_weight("rms_norm", x, weight)
    reason = why_not_triton(x, weight) or unsupported(x, weight)
    if choose("norm", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.norm.triton_norm import triton_rms_norm

        return triton_rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def deepnorm(
    residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, alpha: float, beta: float
) -> Tensor:
    """`rms_norm(alpha residual + beta update, weight, eps)` with the sum rounded nowhere.

    Args:
        residual, update: `[..., hidden]`, one shape and one type.
        weight: `[hidden]`, of any float type.
        alpha, beta: numbers; they receive no gradient.

    Returns:
        Shaped and typed like `residual`. The sum itself is never stored: backward adds again.
    """
    check_weight("deepnorm", residual, weight)
    if residual.shape != update.shape or residual.dtype != update.dtype:
        raise ValueError(
            "deepnorm: residual and update must share shape and dtype, got "
            f"{tuple(residual.shape)} {residual.dtype} and {tuple(update.shape)} {update.dtype}"
        )
    reason = why_not_triton(residual, weight) or unsupported(residual, weight)
    if choose("norm", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.norm.triton_norm import triton_deepnorm

        return triton_deepnorm(residual, update, weight, eps, alpha=alpha, beta=beta)
    return deepnorm_reference(residual, update, weight, eps, alpha=alpha, beta=beta)
