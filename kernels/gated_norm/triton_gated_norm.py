"""RMSNorm times a sigmoid gate on Triton: kernels, torch ops with autograd.

Cut like the plain norm (kernels/norm/triton_norm.py): programs that stay, the weight and the sum of
its gradient in registers, the next rows on their way to shared memory. Tensors moved: forward x,
gate -> y = 3; backward x, gate, dy -> dx, dgate = 5; plus 4 bytes a row for 1/rms and once the
partial sums of the weight's gradient, [programs, hidden] fp32.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator,assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.norm.plan import unsupported
from fulmen.kernels.norm.triton_rows import (
    load_row,
    new_gradients,
    new_output,
    run_backward,
    run_forward,
    store_piece,
    zero_row,
)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_rows,
    gate_rows,
    weight,
    out,
    inverse_rms,
    x_stride,
    gate_stride,
    rows,
    eps,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`out` [rows, HIDDEN] contiguous, `inverse_rms` [rows] fp32."""
    PIECES: tl.constexpr = (HIDDEN + PIECE - 1) // PIECE
    program = tl.program_id(0).to(tl.int64)
    w = load_row(weight, HIDDEN, PIECE)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        x = load_row(x_rows + row * x_stride, HIDDEN, PIECE)
        gate = load_row(gate_rows + row * gate_stride, HIDDEN, PIECE)
        squares = tl.zeros([PIECE], dtype=tl.float32)
        for index in tl.static_range(PIECES):
            piece = x[index].to(tl.float32)
            squares += piece * piece
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
        tl.store(inverse_rms + row, inverse)
        for index in tl.static_range(PIECES):
            normed = x[index].to(tl.float32) * inverse * w[index].to(tl.float32)
            y = tl.sigmoid(gate[index].to(tl.float32)) * normed
            store_piece(out + row * HIDDEN, y, index, HIDDEN, PIECE)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_out,
    x_rows,
    gate_rows,
    weight,
    inverse_rms,
    d_x,
    d_gate,
    d_weights,
    d_out_stride,
    x_stride,
    gate_stride,
    rows,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With n = x / rms, s = sigmoid(gate), h = dy s: dx = (h w - n mean(h w n)) / rms,
    dgate = h n w (1 - s), and dw = sum over rows of h n.

    `d_x` and `d_gate` [rows, HIDDEN] contiguous; `d_weights` [programs, HIDDEN] fp32, the sum over
    each program's rows.
    """
    PIECES: tl.constexpr = (HIDDEN + PIECE - 1) // PIECE
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    w = load_row(weight, HIDDEN, PIECE)
    sums = zero_row(HIDDEN, PIECE)
    # Triton's pipeline leaves single numbers alone: this one is loaded a row ahead by hand.
    inverse = tl.load(inverse_rms + program)
    for row in tl.range(program, rows, programs, num_stages=STAGES):
        next_inverse = tl.load(inverse_rms + row + programs, mask=row + programs < rows, other=0.0)
        dy = load_row(d_out + row * d_out_stride, HIDDEN, PIECE)
        x = load_row(x_rows + row * x_stride, HIDDEN, PIECE)
        gate = load_row(gate_rows + row * gate_stride, HIDDEN, PIECE)
        products = tl.zeros([PIECE], dtype=tl.float32)
        normal = ()
        d_normal = ()
        new_sums = ()
        for index in tl.static_range(PIECES):
            n = x[index].to(tl.float32) * inverse
            sigmoid = tl.sigmoid(gate[index].to(tl.float32))
            gated = dy[index].to(tl.float32) * sigmoid
            d_n = gated * w[index].to(tl.float32)
            products += d_n * n
            # The gate's gradient needs no sum over the row: it leaves at once.
            store_piece(d_gate + row * HIDDEN, d_n * n * (1.0 - sigmoid), index, HIDDEN, PIECE)
            normal = normal + (n,)
            d_normal = d_normal + (d_n,)
            new_sums = new_sums + (sums[index] + gated * n,)
        sums = new_sums
        mean = tl.sum(products, axis=0) / HIDDEN
        for index in tl.static_range(PIECES):
            dx = inverse * (d_normal[index] - normal[index] * mean)
            store_piece(d_x + row * HIDDEN, dx, index, HIDDEN, PIECE)
        inverse = next_inverse
    for index in tl.static_range(PIECES):
        store_piece(d_weights + program * HIDDEN, sums[index], index, HIDDEN, PIECE)


@torch.library.custom_op("fulmen::gated_norm", mutates_args=())
def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output, and 1/rms `[rows]` fp32 for the backward pass."""
    return run_forward(forward_kernel, x, gate, weight, eps)


@_gated_norm.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return new_output(x)


@torch.library.custom_op("fulmen::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    d_out: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    return run_backward(backward_kernel, d_out, x, gate, weight, inverse_rms)


@_gated_norm_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_gate = new_gradients(x, gate)
    return d_x, d_gate, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gate, weight, output[1])


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None
    return *_gated_norm_backward(d_out, *ctx.saved_tensors), None


_gated_norm.register_autograd(_backward, setup_context=_setup_context)


def triton_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm` by the Triton kernels, for arguments whose shapes it has checked."""
    if reason := unsupported(x, weight):
        raise ValueError(f"gated_rms_norm: triton {reason}")
    return _gated_norm(x, gate, weight, eps)[0]
