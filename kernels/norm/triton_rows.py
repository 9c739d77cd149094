"""Pieces of rows in Triton, and launches over them: what kernels that work on whole rows share."""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator,assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.common import as_rows
from fulmen.kernels.norm.plan import (
    BACKWARD_WARPS_PER_PROCESSOR,
    FORWARD_WARPS_PER_PROCESSOR,
    make_plan,
)

COLUMNS = 32
ROWS = 128


@triton.jit
def load_row(row, HIDDEN: tl.constexpr, PIECE: tl.constexpr):
    """The row that starts at pointer `row`, as a tuple of pieces; zeros beyond its end."""
    pieces = ()
    for first in tl.static_range(0, HIDDEN, PIECE):
        column = first + tl.arange(0, PIECE)
        if HIDDEN % PIECE == 0:
            pieces = pieces + (tl.load(row + column),)
        else:
            pieces = pieces + (tl.load(row + column, mask=column < HIDDEN, other=0.0),)
    return pieces


@triton.jit
def store_piece(row, piece, index: tl.constexpr, HIDDEN: tl.constexpr, PIECE: tl.constexpr):
    """Piece `index` of the row that starts at pointer `row`."""
    column = index * PIECE + tl.arange(0, PIECE)
    rounded = piece.to(row.dtype.element_ty)
    if HIDDEN % PIECE == 0:
        tl.store(row + column, rounded)
    else:
        tl.store(row + column, rounded, mask=column < HIDDEN)


@triton.jit
def zero_row(HIDDEN: tl.constexpr, PIECE: tl.constexpr):
    """A row of fp32 zeros, as a tuple of pieces."""
    pieces = ()
    for _ in tl.static_range(0, HIDDEN, PIECE):
        pieces = pieces + (tl.zeros([PIECE], dtype=tl.float32),)
    return pieces


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(
    partial, total, rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """`total` [HIDDEN] = sum over the rows of `partial` [rows, HIDDEN] fp32, in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    line = tl.arange(0, ROWS)[:, None]
    inside = column < HIDDEN
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        row = first + line
        sums += tl.load(partial + row * HIDDEN + column, mask=inside & (row < rows), other=0.0)
    result = tl.sum(sums, axis=0, keep_dims=True).to(total.dtype.element_ty)
    tl.store(total + column, result, mask=inside)


def sum_over_programs(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """`[hidden]` sum of the programs' parts `[programs, hidden]` fp32; the same at every run."""
    rows, hidden = partial.shape
    total = torch.empty(hidden, dtype=dtype, device=partial.device)
    with torch.cuda.device_of(partial):
        column_sum_kernel[(-(-hidden // COLUMNS),)](
            partial, total, rows, HIDDEN=hidden, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    return total


def new_output(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `run_forward` returns for `x`, unwritten."""
    rows = x.numel() // x.shape[-1]
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(rows, dtype=torch.float32, device=x.device),
    )


def new_gradients(x: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs, unwritten; empty for one that there is not."""
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        x.new_empty((0,) if second is None else second.shape),
    )


def run_forward(
    kernel: Any, x: Tensor, second: Tensor | None, weight: Tensor, *numbers: float, **constants: Any
) -> tuple[Tensor, Tensor]:
    """Output like `x`, and 1/rms `[rows]` fp32 for the backward pass.

    Args:
        second: shaped and typed like `x`; without one the kernel is handed `x` for it.
        numbers, constants: what the kernel takes behind the number of rows.
    """
    x_rows = as_rows(x)
    second_rows = x_rows if second is None else as_rows(second)
    rows, hidden = x_rows.shape
    out, inverse_rms = new_output(x)
    plan = make_plan(
        x_rows,
        num_inputs=1 if second is None else 2,
        warps_per_processor=FORWARD_WARPS_PER_PROCESSOR,
    )
    if rows:
        with torch.cuda.device_of(x):
            kernel[(plan.programs,)](
                x_rows,
                second_rows,
                weight.contiguous(),
                out,
                inverse_rms,
                x_rows.stride(0),
                second_rows.stride(0),
                rows,
                *numbers,
                HIDDEN=hidden,
                **constants,
                **plan.options(),
            )
    return out, inverse_rms


def run_backward(
    kernel: Any,
    d_out: Tensor,
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    inverse_rms: Tensor,
    *numbers: float,
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, second (empty if there was none) and weight; arguments as forward."""
    d_out_rows, x_rows = as_rows(d_out), as_rows(x)
    second_rows = x_rows if second is None else as_rows(second)
    rows, hidden = x_rows.shape
    d_x, d_second = new_gradients(x, second)
    plan = make_plan(
        x_rows,
        num_inputs=2 if second is None else 3,
        warps_per_processor=BACKWARD_WARPS_PER_PROCESSOR,
    )
    d_weights = torch.empty(plan.programs, hidden, dtype=torch.float32, device=x.device)
    if rows:
        with torch.cuda.device_of(x):
            kernel[(plan.programs,)](
                d_out_rows,
                x_rows,
                second_rows,
                weight.contiguous(),
                inverse_rms,
                d_x,
                d_second,
                d_weights,
                d_out_rows.stride(0),
                x_rows.stride(0),
                second_rows.stride(0),
                rows,
                *numbers,
                HIDDEN=hidden,
                **constants,
                **plan.options(),
            )
    return d_x, d_second, sum_over_programs(d_weights, weight.dtype)
