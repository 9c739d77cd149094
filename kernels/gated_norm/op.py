"""The public op: argument checks, and the choice between Triton and the reference."""

from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.gated_norm.reference import gated_rms_norm_reference
from fulmen.kernels.norm.plan import check_weight, unsupported
from fulmen.kernels.registry import choose


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`sigmoid(gate) * x / sqrt(mean(x^2) + eps) * weight` over the last dim.

    Args:
        x, gate: `[..., hidden]`, one shape and one type; the gate comes before its sigmoid.
        weight: `[hidden]`, of any float type.

    Returns:
        Shaped and typed like `x`. Arithmetic is fp32 (fp64 for fp64), rounded once, at the end.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(
            "gated_rms_norm: x and gate must share shape and dtype, got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(gate.shape)} {gate.dtype}"
        )
    check_weight("gated_rms_norm", x, weight)
    reason = why_not_triton(x, weight) or unsupported(x, weight)
    if choose("gated_norm", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.gated_norm.triton_gated_norm import triton_gated_rms_norm

        return triton_gated_rms_norm(x, gate, weight, eps)
    return gated_rms_norm_reference(x, gate, weight, eps)
