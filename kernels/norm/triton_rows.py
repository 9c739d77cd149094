"""Pieces of rows in Triton: what the kernels that work on whole rows share."""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator,assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

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
