"""The public op: argument checks, and the choice between Triton and the reference."""

from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.registry import choose
from fulmen.kernels.swiglu.reference import reference_swiglu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate, up: `[..., n]`, one shape and dtype. The halves of a joint projection are read in
            place; a layout whose rows do not lie at one distance is copied first.

    Returns:
        `[..., n]`, contiguous, of the input's dtype; computed in fp32 (fp64 for fp64 inputs).
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0:
        raise ValueError(
            "swiglu: gate and up must share one shape [..., n] and one dtype, got "
            f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    if choose("swiglu", ("triton", why_not_triton(gate, up)), ("torch", "")) == "triton":
        from fulmen.kernels.swiglu.triton_swiglu import triton_swiglu

        return triton_swiglu(gate, up)
    return reference_swiglu(gate, up)
