"""Rows that lie in segments by two keys, from the order of one key to that of the other, on Triton.

A program moves ROWS rows. It finds the segment of each in the table of sizes, which is small
enough to be compared as a whole with every row: no sort, no scan before, no index in memory. The
rows are read and written once, and the table lies in the cache.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
TILE_SIZE = 4096
"""Numbers of rows in flight, and the most comparisons of rows with segments."""
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def transpose_segments_kernel(
    x,
    out,
    sizes,
    rows,
    outer_stride,
    inner_stride,
    NUM_OUTER: tl.constexpr,
    NUM_INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    segment = tl.arange(0, BLOCK_SEGMENTS)
    outer, inner = segment // NUM_INNER, segment % NUM_INNER
    exists = segment < NUM_OUTER * NUM_INNER
    size = tl.load(sizes + outer * outer_stride + inner * inner_stride, mask=exists, other=0)
    ends = tl.cumsum(size, 0)
    # How many segments end before a row; rows behind them all have nowhere to go.
    mine = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    start = tl.sum(tl.where(segment[None, :] == mine[:, None], (ends - size)[None, :], 0), 1)
    mine_outer, mine_inner = mine // NUM_INNER, mine % NUM_INNER
    outer_before = (inner[None, :] == mine_inner[:, None]) & (outer[None, :] < mine_outer[:, None])
    before = (inner[None, :] < mine_inner[:, None]) | outer_before
    moved = tl.sum(tl.where(before, size[None, :], 0), 1) + row - start
    target = tl.where(mine < NUM_OUTER * NUM_INNER, moved, row)
    for first in range(0, HIDDEN, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (column < HIDDEN)[None, :]
        tile = tl.load(x + row[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
        tl.store(out + target[:, None] * HIDDEN + column[None, :], tile, mask=inside)


@torch.library.custom_op("fulmen::transpose_segments", mutates_args=())
def triton_transpose_segments(x: Tensor, sizes: Tensor) -> Tensor:
    """`transpose_segments`, for fp32 or bf16; the hidden size a multiple of 8."""
    rows, hidden = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows * hidden:
        return out
    block_segments = triton.next_power_of_2(sizes.numel())
    block_rows = max(1, min(ROWS, TILE_SIZE // block_segments))
    with torch.cuda.device_of(x):
        transpose_segments_kernel[(triton.cdiv(rows, block_rows),)](
            x.contiguous(),
            out,
            sizes,
            rows,
            *sizes.stride(),
            NUM_OUTER=sizes.shape[0],
            NUM_INNER=sizes.shape[1],
            HIDDEN=hidden,
            ROWS=block_rows,
            CHUNK=min(TILE_SIZE // block_rows, triton.next_power_of_2(hidden)),
            BLOCK_SEGMENTS=block_segments,
            num_warps=NUM_WARPS,
        )
    return out


@triton_transpose_segments.register_fake
def _(x: Tensor, sizes: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
    (sizes,) = ctx.saved_tensors
    return triton_transpose_segments(d_out, sizes.t()), None


triton_transpose_segments.register_autograd(_backward, setup_context=_setup_context)
