"""SwiGLU experts over tokens sorted by expert: the public op."""

import torch
from torch import Tensor

from fulmen.kernels.common import NEEDS_CUDA, why_not_triton
from fulmen.kernels.moe.late_gradients import LateGradients, late_grouped_swiglu
from fulmen.kernels.moe.reference import reference_grouped_swiglu
from fulmen.kernels.registry import choose


def grouped_swiglu(
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    late: LateGradients | None = None,
) -> Tensor:
    """Apply expert e's `w2 (silu(w1 x) * w3 x)` to its rows.

    Args:
        x: `[rows, hidden_size]`, sorted by expert.
        counts: `[num_experts]` int64 rows of each expert; rows after their sum are not read and
            get 0.
        w1, w3: `[num_experts, expert_hidden_size, hidden_size]`.
        w2: `[num_experts, hidden_size, expert_hidden_size]`.
        late: where the matrices are those of `with_late_gradients`, what came with them.
    """
    num_experts, inner, hidden = w1.shape
    fits = w1.shape == w3.shape and w2.shape == (num_experts, hidden, inner)
    if x.dim() != 2 or x.shape[1] != hidden or counts.shape != (num_experts,) or not fits:
        raise ValueError(
            "grouped_swiglu: x [rows, hidden], counts [experts], w1 and w3 [experts, inner, "
            "hidden], w2 [experts, hidden, inner] do not fit: got "
            + ", ".join(str(tuple(tensor.shape)) for tensor in (x, counts, w1, w3, w2))
        )
    if not x.dtype == w1.dtype == w3.dtype == w2.dtype:
        raise ValueError(
            "grouped_swiglu: x and the weights must share one dtype, got "
            f"{x.dtype}, {w1.dtype}, {w3.dtype}, {w2.dtype}"
        )
    implementation = choose(
        "grouped_gemm",
        ("grouped_mm", _why_not_grouped_mm(x, inner)),
        ("triton", why_not_triton(x)),
        ("torch", ""),
    )
    if late is not None:
        return late_grouped_swiglu(x, counts, w1, w3, w2, implementation, late)
    if implementation == "torch":
        return reference_grouped_swiglu(x, counts, w1, w3, w2)
    from fulmen.kernels.moe.triton_experts import fused_grouped_swiglu

    return fused_grouped_swiglu(x, counts, w1, w3, w2, implementation)


def _why_not_grouped_mm(x: Tensor, inner: int) -> str:
    if not x.is_cuda:
        return NEEDS_CUDA
    if x.dtype != torch.bfloat16:
        return "needs bf16"
    if x.shape[1] % 8 or inner % 8:
        # Its operands' rows begin at multiples of 16 bytes.
        return "needs hidden sizes that are multiples of 8"
    # Before Hopper it loops and makes the host wait; on Blackwell the weight gradients of experts
    # without rows are not zero (pytorch issue 172439, torch up to 2.13).
    return "" if _is_hopper(x.device.index) else "needs compute capability 9.0"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)
