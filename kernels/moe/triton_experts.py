"""The experts as one op: nine grouped products, and what lies between them written by hand.

Memory passes beside the products, in tensors of M rows (h hidden, f inner numbers a row):

    forward    SwiGLU reads gate and up, writes the inner rows             3 f
    backward   SwiGLU reads its gradient, gate and up, writes the
               gradients of both and the inner rows again                  6 f
               the sum of the two gradients of x, in place                 3 h

The inner rows are computed again, not saved: one f of 6 written, 0.07 ms of 28 at 16K rows of
Text-01 on an H200, for a quarter of the saved memory (x, gate and up stay). They take the place of
their gradient, element by element. Rows behind the last expert's are skipped, and set to 0 where
they leave the op.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.moe import triton_grouped_gemm
from fulmen.kernels.swiglu import swiglu
from fulmen.kernels.triton_common import silu_gradient

BLOCK = 2048
"""4 KiB of bf16, two 16-byte loads for each of 128 threads."""
NUM_WARPS = 4
TAIL_PROGRAMS = 512
"""They share the rows behind the last expert's, of which there are mostly none."""


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    d_inner, gate, up, d_gate, d_up, ends, num_experts, rows, columns, BLOCK: tl.constexpr
):
    """Leaves `silu(gate) * up` in `d_inner`."""
    limit = tl.load(ends + num_experts - 1).to(tl.int64) * columns
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < limit
    g = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(d_inner + index, mask=inside, other=0.0).to(tl.float32)
    dg = silu_gradient(dy * u, g)
    silu = g * tl.sigmoid(g)
    tl.store(d_gate + index, dg.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + index, (dy * silu).to(d_up.dtype.element_ty), mask=inside)
    tl.store(d_inner + index, (silu * u).to(d_inner.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def add_kernel(x, y, ends, num_experts, rows, columns, BLOCK: tl.constexpr):
    """`x += y` in the experts' rows, 0 behind them."""
    limit = tl.load(ends + num_experts - 1).to(tl.int64) * columns
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < limit
    total = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
    exists = index < tl.cast(rows, tl.int64) * columns
    tl.store(x + index, total.to(x.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def zero_tail_kernel(x, ends, num_experts, rows, columns, BLOCK: tl.constexpr):
    limit = tl.load(ends + num_experts - 1).to(tl.int64) * columns
    size = tl.cast(rows, tl.int64) * columns
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = limit + tl.program_id(0).to(tl.int64) * BLOCK
    for number in range(tl.cdiv(size - first, step).to(tl.int32)):
        index = first + number * step + tl.arange(0, BLOCK)
        tl.store(x + index, tl.zeros([BLOCK], x.dtype.element_ty), mask=index < size)


def _run(kernel: Any, ends: Tensor, *tensors: Tensor, most_programs: int = 2**31 - 1) -> None:
    """Over the elements of the tensors, which are `[rows, columns]`, contiguous."""
    rows, columns = tensors[0].shape
    programs = min(most_programs, triton.cdiv(rows * columns, BLOCK))
    with torch.cuda.device_of(ends):
        kernel[(programs,)](
            *tensors, ends, ends.shape[0], rows, columns, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


def _multiply(x: Tensor, matrices: Tensor, ends: Tensor, implementation: str) -> Tensor:
    """`x_r @ matrices_e` for each row r of expert e; rows behind the last are not written."""
    if implementation == "grouped_mm":
        return torch._grouped_mm(x, matrices, offs=ends)
    return triton_grouped_gemm.multiply(x, matrices, ends)


def _outer(a: Tensor, b: Tensor, ends: Tensor, implementation: str) -> Tensor:
    """For each expert the sum of `a_r^T b_r` over its rows."""
    if not a.shape[0]:
        return a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    if implementation == "grouped_mm":
        return torch._grouped_mm(a.t(), b, offs=ends)
    return triton_grouped_gemm.outer(a, b, ends)


@torch.library.custom_op("fulmen::grouped_swiglu", mutates_args=())
def _grouped_swiglu(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and for the backward pass the rows of gate and up."""
    if not x.shape[0]:
        gate, up = (x.new_empty(0, w1.shape[1]) for _ in range(2))
        return x.new_empty(x.shape), gate, up
    x, w1, w3, w2 = (tensor.contiguous() for tensor in (x, w1, w3, w2))
    ends = counts.cumsum(0, dtype=torch.int32)
    gate = _multiply(x, w1.transpose(1, 2), ends, implementation)
    up = _multiply(x, w3.transpose(1, 2), ends, implementation)
    y = _multiply(swiglu(gate, up), w2.transpose(1, 2), ends, implementation)
    _run(zero_tail_kernel, ends, y, most_programs=TAIL_PROGRAMS)
    return y, gate, up


@_grouped_swiglu.register_fake
def _(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (x.new_empty(x.shape[0], w1.shape[1]) for _ in range(2))
    return x.new_empty(x.shape), gate, up


def rows_backward(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    gate: Tensor,
    up: Tensor,
    implementation: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Gradient of x, and what `weights_backward` takes."""
    ends = counts.cumsum(0, dtype=torch.int32)
    dy, x, w1, w3, w2 = (tensor.contiguous() for tensor in (dy, x, w1, w3, w2))
    if not x.shape[0]:
        return x.new_empty(x.shape), (dy, x, gate, up, gate, ends)
    inner = _multiply(dy, w2, ends, implementation)  # its gradient, until the kernel has run
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _run(swiglu_backward_kernel, ends, inner, gate, up, d_gate, d_up)
    dx = _multiply(d_gate, w1, ends, implementation)
    _run(add_kernel, ends, dx, _multiply(d_up, w3, ends, implementation))
    return dx, (dy, x, d_gate, d_up, inner, ends)


def weights_backward(
    dy: Tensor,
    x: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
    inner: Tensor,
    ends: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, w3 and w2."""
    dw2 = _outer(dy, inner, ends, implementation)
    dw1 = _outer(d_gate, x, ends, implementation)
    return dw1, _outer(d_up, x, ends, implementation), dw2


@torch.library.custom_op("fulmen::grouped_swiglu_backward", mutates_args=())
def _grouped_swiglu_backward(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    gate: Tensor,
    up: Tensor,
    implementation: str,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w3 and w2; those of the matrices are empty unless needed."""
    dx, rest = rows_backward(dy, x, counts, w1, w3, w2, gate, up, implementation)
    if not need_weights:
        return dx, w1.new_empty(0), w3.new_empty(0), w2.new_empty(0)
    return dx, *weights_backward(*rest, implementation)


@_grouped_swiglu_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    gate: Tensor,
    up: Tensor,
    implementation: str,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw1, dw3, dw2 = (w.new_empty(w.shape if need_weights else (0,)) for w in (w1, w3, w2))
    return x.new_empty(x.shape), dw1, dw3, dw2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(
    ctx: Any, dy: Tensor | None, _gate: Tensor | None, _up: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    need_weights = any(ctx.needs_input_grad[2:5])
    dx, *d_weights = _grouped_swiglu_backward(
        dy, *ctx.saved_tensors, ctx.implementation, need_weights
    )
    if not need_weights:
        return dx, None, None, None, None, None
    return dx, None, *d_weights, None


_grouped_swiglu.register_autograd(_backward, setup_context=_setup_context)


def fused_grouped_swiglu(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, implementation: str
) -> Tensor:
    """`grouped_swiglu` for fp32 or bf16 with Triton's products or `torch._grouped_mm`.

    Args:
        implementation: `triton` or `grouped_mm`.
    """
    return fused_experts(x, counts, w1, w3, w2, implementation)[0]


def fused_experts(
    x: Tensor, counts: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and for a backward pass by hand the rows of gate and up."""
    outputs: tuple[Tensor, Tensor, Tensor] = _grouped_swiglu(x, counts, w1, w3, w2, implementation)
    return outputs
