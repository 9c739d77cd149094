"""RMSNorm on Triton, with or without the DeepNorm sum: kernels, torch ops with autograd.

Programs stay on their multiprocessor and take every `programs`-th row, so that the weight (and
backward the sum of its gradient) lives in registers for all of them. `tl.range(num_stages=...)`
copies the next rows to shared memory while one is reduced. Bytes a row, of `hidden` numbers each:

| | reads | writes | in all |
|---|---|---|---|
| rms_norm forward / backward | x / x, dy | y / dx | 2 / 3 |
| deepnorm forward / backward | residual, update / those and dy | y / two gradients | 3 / 5 |

plus 4 for 1/rms, and backward [programs, hidden] fp32 of partial sums once, 6.5 MB written and read
again at hidden 6144 on 132 multiprocessors (1 % of rms_norm's bytes at 32768 tokens).
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


@triton.jit
def add_piece(x, f, alpha, beta, index: tl.constexpr, HAS_UPDATE: tl.constexpr):
    """What is normalised: a piece of x, or of alpha x + beta f, in fp32."""
    if HAS_UPDATE:
        return alpha * x[index].to(tl.float32) + beta * f[index].to(tl.float32)
    else:
        return x[index].to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    residual,
    update,
    weight,
    out,
    inverse_rms,
    residual_stride,
    update_stride,
    rows,
    eps,
    alpha,
    beta,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`out` [rows, HIDDEN] contiguous, `inverse_rms` [rows] fp32; `update` is unread without."""
    PIECES: tl.constexpr = (HIDDEN + PIECE - 1) // PIECE
    program = tl.program_id(0).to(tl.int64)
    w = load_row(weight, HIDDEN, PIECE)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        x = load_row(residual + row * residual_stride, HIDDEN, PIECE)
        f = x
        if HAS_UPDATE:
            f = load_row(update + row * update_stride, HIDDEN, PIECE)
        squares = tl.zeros([PIECE], dtype=tl.float32)
        z = ()
        for index in tl.static_range(PIECES):
            piece = add_piece(x, f, alpha, beta, index, HAS_UPDATE)
            squares += piece * piece
            z = z + (piece,)
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
        tl.store(inverse_rms + row, inverse)
        for index in tl.static_range(PIECES):
            y = z[index] * inverse * w[index].to(tl.float32)
            store_piece(out + row * HIDDEN, y, index, HIDDEN, PIECE)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_out,
    residual,
    update,
    weight,
    inverse_rms,
    d_residual,
    d_update,
    d_weights,
    d_out_stride,
    residual_stride,
    update_stride,
    rows,
    alpha,
    beta,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With n = z / rms: dz = (dy w - n mean(dy w n)) / rms, and dw = sum over rows of dy n.

    `d_residual` and `d_update` [rows, HIDDEN] contiguous; `d_weights` [programs, HIDDEN] fp32, the
    sum over each program's rows.
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
        x = load_row(residual + row * residual_stride, HIDDEN, PIECE)
        f = x
        if HAS_UPDATE:
            f = load_row(update + row * update_stride, HIDDEN, PIECE)
        products = tl.zeros([PIECE], dtype=tl.float32)
        normal = ()
        new_sums = ()
        for index in tl.static_range(PIECES):
            n = add_piece(x, f, alpha, beta, index, HAS_UPDATE) * inverse
            product = dy[index].to(tl.float32) * n
            products += product * w[index].to(tl.float32)
            normal = normal + (n,)
            new_sums = new_sums + (sums[index] + product,)
        sums = new_sums
        mean = tl.sum(products, axis=0) / HIDDEN
        for index in tl.static_range(PIECES):
            d_normal = dy[index].to(tl.float32) * w[index].to(tl.float32)
            dz = inverse * (d_normal - normal[index] * mean)
            if HAS_UPDATE:
                store_piece(d_residual + row * HIDDEN, alpha * dz, index, HIDDEN, PIECE)
                store_piece(d_update + row * HIDDEN, beta * dz, index, HIDDEN, PIECE)
            else:
                store_piece(d_residual + row * HIDDEN, dz, index, HIDDEN, PIECE)
        inverse = next_inverse
    for index in tl.static_range(PIECES):
        store_piece(d_weights + program * HIDDEN, sums[index], index, HIDDEN, PIECE)


@torch.library.custom_op("fulmen::norm", mutates_args=())
def _norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Output, and 1/rms `[rows]` fp32 for the backward pass. Without update, alpha is unread."""
    has_update = update is not None
    return run_forward(
        forward_kernel, residual, update, weight, eps, alpha, beta, HAS_UPDATE=has_update
    )


@_norm.register_fake
def _(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    return new_output(residual)


@torch.library.custom_op("fulmen::norm_backward", mutates_args=())
def _norm_backward(
    d_out: Tensor,
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    inverse_rms: Tensor,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, update (empty if there was none) and weight."""
    return run_backward(
        backward_kernel,
        d_out,
        residual,
        update,
        weight,
        inverse_rms,
        alpha,
        beta,
        HAS_UPDATE=update is not None,
    )


@_norm_backward.register_fake
def _(
    d_out: Tensor,
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    inverse_rms: Tensor,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_residual, d_update = new_gradients(residual, update)
    return d_residual, d_update, weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, update, weight, _, ctx.alpha, ctx.beta = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(residual, update, weight, output[1])


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    residual, update, weight, inverse_rms = ctx.saved_tensors
    if d_out is None:
        return None, None, None, None, None, None
    d_residual, d_update, d_weight = _norm_backward(
        d_out, residual, update, weight, inverse_rms, ctx.alpha, ctx.beta
    )
    return d_residual, None if update is None else d_update, d_weight, None, None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the Triton kernels, for arguments whose shapes it has checked."""
    if reason := unsupported(x, weight):
        raise ValueError(f"rms_norm: triton {reason}")
    return _norm(x, None, weight, eps, 1.0, 0.0)[0]


def triton_deepnorm(
    residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, alpha: float, beta: float
) -> Tensor:
    """`deepnorm` by the Triton kernels, for arguments whose shapes it has checked."""
    if reason := unsupported(residual, weight):
        raise ValueError(f"deepnorm: triton {reason}")
    return _norm(residual, update, weight, eps, alpha, beta)[0]
