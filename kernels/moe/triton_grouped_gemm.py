"""Grouped matrix products on Triton: each expert's rows with its matrix.

For GPUs and types that `torch._grouped_mm` does not take. `ends` `[num_experts]` int32 is the
inclusive scan of the experts' numbers of rows; which expert a tile of rows belongs to is looked up
on the device, in registers. The grid holds as many row tiles as there can be (every expert may end
in the middle of one); what is too many returns at once. fp32 operands are multiplied exactly.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.triton_common import product

TILES_TOGETHER = 8
"""Row tiles that run side by side on the same columns, so that these are read from L2."""


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """96 KiB of shared memory in bf16, which every chip from sm_80 on has; small for exact fp32."""
    rows, columns, inner, warps, stages = (
        (64, 64, 16, 4, 2) if dtype == torch.float32 else (128, 128, 64, 8, 3)
    )
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "BLOCK_INNER": inner,
        "num_warps": warps,
        "num_stages": stages,
    }


@triton.jit
def rows_of_tile(tile, ends, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """(expert, first row of the tile, end of the expert's rows); no expert: `num_experts`."""
    index = tl.arange(0, BLOCK_EXPERTS)
    listed = index < num_experts
    end = tl.load(ends + index, mask=listed, other=0)
    begin = tl.load(ends + index - 1, mask=listed & (index > 0), other=0)
    tiles = tl.where(listed, tl.cdiv(end - begin, BLOCK_ROWS), 0)
    tile_end = tl.cumsum(tiles, 0)
    expert = tl.sum((listed & (tile_end <= tile)).to(tl.int32), 0)
    mine = index == expert
    number = tile - tl.sum(tl.where(mine, tile_end - tiles, 0), 0)
    first = tl.sum(tl.where(mine, begin, 0), 0) + number * BLOCK_ROWS
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit(do_not_specialize=["row_tiles"])
def multiply_kernel(
    x,
    matrices,
    out,
    ends,
    row_tiles,
    num_experts,
    inner,
    columns,
    expert_stride,
    inner_stride,
    column_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    group = tl.program_id(0) // (TILES_TOGETHER * column_tiles)
    place = tl.program_id(0) % (TILES_TOGETHER * column_tiles)
    group_size = tl.minimum(row_tiles - group * TILES_TOGETHER, TILES_TOGETHER)
    tile = group * TILES_TOGETHER + place % group_size
    expert, first, end = rows_of_tile(tile, ends, num_experts, BLOCK_ROWS, BLOCK_EXPERTS)
    if expert == num_experts:
        return
    row = first.to(tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (place // group_size).to(tl.int64) * BLOCK_COLUMNS
    column += tl.arange(0, BLOCK_COLUMNS)[None, :]
    along = tl.arange(0, BLOCK_INNER)
    x_tile = x + row * inner + along[None, :]
    matrix = matrices + expert.to(tl.int64) * expert_stride
    matrix_tile = matrix + along[:, None] * inner_stride + column * column_stride
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        left = inner - start
        a = tl.load(x_tile, mask=(row < end) & (along[None, :] < left), other=0.0)
        b = tl.load(matrix_tile, mask=(along[:, None] < left) & (column < columns), other=0.0)
        accumulator = product(a, b, accumulator)
        x_tile += BLOCK_INNER
        matrix_tile += BLOCK_INNER * inner_stride
    target = out + row * columns + column
    result = accumulator.to(out.dtype.element_ty)
    tl.store(target, result, mask=(row < end) & (column < columns))


@triton.jit
def outer_kernel(
    a,
    b,
    out,
    ends,
    heights,
    widths,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A program owns a tile of one expert's [heights, widths] and sums over its rows in order."""
    across = tl.cdiv(widths, BLOCK_COLUMNS)
    tiles = tl.cdiv(heights, BLOCK_ROWS) * across
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    num_rows = (tl.load(ends + expert) - begin).to(tl.int32)
    height = (place // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    width = (place % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    along = tl.arange(0, BLOCK_INNER)
    a_tile = a + (begin + along[None, :]) * heights + height
    b_tile = b + (begin + along[:, None]) * widths + width
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_rows, BLOCK_INNER):
        left = num_rows - start
        x = tl.load(a_tile, mask=(along[None, :] < left) & (height < heights), other=0.0)
        y = tl.load(b_tile, mask=(along[:, None] < left) & (width < widths), other=0.0)
        accumulator = product(x, y, accumulator)
        a_tile += tl.cast(heights, tl.int64) * BLOCK_INNER
        b_tile += tl.cast(widths, tl.int64) * BLOCK_INNER
    target = out + (expert * heights + height) * widths + width
    result = accumulator.to(out.dtype.element_ty)
    tl.store(target, result, mask=(height < heights) & (width < widths))


def multiply(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`x_r @ matrices_e` for each row r of expert e; the rows behind the last are not written.

    `x` is `[rows, inner]` contiguous, `matrices` `[num_experts, inner, columns]` of any strides.
    """
    rows, inner = x.shape
    num_experts, _, columns = matrices.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = _tile(x.dtype)
    row_tiles = rows // tile["BLOCK_ROWS"] + min(rows, num_experts)
    with torch.cuda.device_of(x):
        multiply_kernel[(row_tiles * triton.cdiv(columns, tile["BLOCK_COLUMNS"]),)](
            x,
            matrices,
            out,
            ends,
            row_tiles,
            num_experts,
            inner,
            columns,
            *matrices.stride(),
            BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
            TILES_TOGETHER=TILES_TOGETHER,
            **tile,
        )
    return out


def outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`[num_experts, heights, widths]`: for each expert the sum of `a_r^T b_r` over its rows.

    `a` is `[rows, heights]` and `b` `[rows, widths]`, both contiguous.
    """
    heights, widths = a.shape[1], b.shape[1]
    num_experts = ends.shape[0]
    out = torch.empty(num_experts, heights, widths, dtype=a.dtype, device=a.device)
    tile = _tile(a.dtype)
    tiles = triton.cdiv(heights, tile["BLOCK_ROWS"]) * triton.cdiv(widths, tile["BLOCK_COLUMNS"])
    with torch.cuda.device_of(a):
        outer_kernel[(num_experts * tiles,)](a, b, out, ends, heights, widths, **tile)
    return out
