"""Counting sort of assignments by expert, and rows into that order and back, on Triton.

**Sort.** Blocks of BLOCK assignments: `rank_kernel` compares every two of a block, which gives an
assignment's place among those of its expert and block, and the block's counts; a scan of the counts
by (expert, block) gives where each pair begins; `destination_kernel` adds the two. The order is
stable, and no atomics are used.

**Rows.** A program owns a token and its k rows, so that what is per token moves once. Memory floor,
with x the size of the tokens: permute reads x and writes k x; its gradient (`unpermute_kernel`
without weights) the other way round; unpermute reads k x and writes x; its gradient reads k x and x
and writes k x. A program has 4 to 12 KiB of what it reads in flight, in 16-byte loads, and 8 to 16
programs share a multiprocessor (32 to 64 registers a thread): at least 64 KiB.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
TILE_SIZE = 4096
NARROWEST_CHUNK = 1024
"""16 bytes of bf16 for each of 128 threads, so that a column's choices are summed in one thread."""
NUM_WARPS = 4


@triton.jit(do_not_specialize=["assignments", "num_blocks"])
def rank_kernel(
    experts, ranks, block_counts, assignments, num_experts, num_blocks, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    here = tl.arange(0, BLOCK)[:, None]
    there = tl.arange(0, BLOCK)[None, :]
    mine = tl.load(experts + first + here, mask=first + here < assignments, other=-1)
    other = tl.load(experts + first + there, mask=first + there < assignments, other=-1)
    same = mine.to(tl.int32) == other.to(tl.int32)
    rank = tl.sum((same & (there < here)).to(tl.int32), 1)
    count = tl.sum(same.to(tl.int32), 1)
    index = first + tl.arange(0, BLOCK)
    inside = index < assignments
    expert = tl.load(experts + index, mask=inside, other=0)
    known = inside & (expert >= 0) & (expert <= num_experts)
    tl.store(ranks + index, rank, mask=inside)
    # All assignments of a pair store the same number; pairs without any keep their zero.
    tl.store(block_counts + expert * num_blocks + block, count, mask=known)


@triton.jit(do_not_specialize=["assignments", "num_blocks"])
def destination_kernel(
    experts,
    ranks,
    block_counts,
    ends,
    destinations,
    counts,
    num_kept,
    assignments,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """`ends` is the inclusive scan of `block_counts`. The same index runs over the experts."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < assignments
    expert = tl.load(experts + index, mask=inside, other=0)
    pair = expert * num_blocks + index // BLOCK
    known = inside & (expert >= 0) & (expert <= num_experts)
    start = tl.load(ends + pair, mask=known, other=0)
    start -= tl.load(block_counts + pair, mask=known, other=0)
    rank = tl.load(ranks + index, mask=inside, other=0)
    tl.store(destinations + index, start + rank, mask=inside)

    listed = index < num_experts
    end = tl.load(ends + (index + 1) * num_blocks - 1, mask=listed, other=0)
    previous = tl.load(ends + index * num_blocks - 1, mask=listed & (index > 0), other=0)
    tl.store(counts + index, end - previous, mask=listed)
    tl.store(num_kept + index * 0, end, mask=index == num_experts - 1)


@triton.jit
def rows_of(destinations, num_kept, NUM_CHOICES: tl.constexpr, BLOCK_CHOICES: tl.constexpr):
    """(token, its choices, their rows, which choices exist, which are kept)."""
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, BLOCK_CHOICES)
    exists = choice < NUM_CHOICES
    row = tl.load(destinations + token * NUM_CHOICES + choice, mask=exists, other=0)
    return token, choice, row, exists, exists & (row < tl.load(num_kept))


@triton.jit
def permute_kernel(
    x,
    rows,
    destinations,
    num_kept,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    token, _, row, exists, kept = rows_of(destinations, num_kept, NUM_CHOICES, BLOCK_CHOICES)
    for first in range(0, HIDDEN, CHUNK):
        column = first + tl.arange(0, CHUNK)
        value = tl.load(x + token * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        tile = tl.where(kept[:, None], value[None, :], 0.0)
        target = row[:, None] * HIDDEN + column[None, :]
        tl.store(rows + target, tile, mask=exists[:, None] & (column < HIDDEN)[None, :])


@triton.jit
def unpermute_kernel(
    rows,
    weights,
    out,
    destinations,
    num_kept,
    HAS_WEIGHTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    token, choice, row, _, kept = rows_of(destinations, num_kept, NUM_CHOICES, BLOCK_CHOICES)
    if HAS_WEIGHTS:
        weight = tl.load(weights + token * NUM_CHOICES + choice, mask=kept, other=0.0)
        weight = weight.to(tl.float32)
    for first in range(0, HIDDEN, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = kept[:, None] & (column < HIDDEN)[None, :]
        tile = tl.load(rows + row[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
        tile = tile.to(tl.float32)
        if HAS_WEIGHTS:
            tile = tile * weight[:, None]
        result = tl.sum(tile, 0).to(out.dtype.element_ty)
        tl.store(out + token * HIDDEN + column, result, mask=column < HIDDEN)


@triton.jit
def unpermute_backward_kernel(
    d_out,
    rows,
    weights,
    d_rows,
    d_weights,
    destinations,
    num_kept,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    token, choice, row, exists, kept = rows_of(destinations, num_kept, NUM_CHOICES, BLOCK_CHOICES)
    weight = tl.load(weights + token * NUM_CHOICES + choice, mask=kept, other=0.0).to(tl.float32)
    products = tl.zeros([BLOCK_CHOICES, CHUNK], tl.float32)
    for first in range(0, HIDDEN, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = (column < HIDDEN)[None, :]
        target = row[:, None] * HIDDEN + column[None, :]
        dy = tl.load(d_out + token * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        dy = dy.to(tl.float32)[None, :]
        tile = tl.load(rows + target, mask=kept[:, None] & inside, other=0.0).to(tl.float32)
        products += tile * dy
        d_tile = tl.where(kept[:, None], weight[:, None] * dy, 0.0)
        tl.store(d_rows + target, d_tile.to(d_rows.dtype.element_ty), mask=exists[:, None] & inside)
    d_weight = tl.where(kept, tl.sum(products, 1), 0.0).to(d_weights.dtype.element_ty)
    tl.store(d_weights + token * NUM_CHOICES + choice, d_weight, mask=exists)


def _run_by_token(kernel: Any, destinations: Tensor, hidden: int, *arguments: Any) -> None:
    tokens, k = destinations.shape
    if not tokens * k * hidden:
        return
    block_choices = triton.next_power_of_2(k)
    # The largest power of two that divides a row leaves no thread idle.
    chunk = max(NARROWEST_CHUNK, min(hidden & -hidden, TILE_SIZE // block_choices))
    with torch.cuda.device_of(destinations):
        kernel[(tokens,)](
            *arguments,
            HIDDEN=hidden,
            CHUNK=min(chunk, triton.next_power_of_2(hidden)),
            NUM_CHOICES=k,
            BLOCK_CHOICES=block_choices,
            num_warps=NUM_WARPS,
        )


def _allocate_order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(experts.shape, dtype=torch.int64, device=experts.device),
        torch.empty(num_experts, dtype=torch.int64, device=experts.device),
        torch.empty(1, dtype=torch.int64, device=experts.device),
    )


@torch.library.custom_op("fulmen::permutation", mutates_args=())
def triton_permutation(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Destinations, counts and the number kept, for `experts` `[tokens, k]` int64."""
    destinations, counts, num_kept = _allocate_order(experts, num_experts)
    experts = experts.contiguous()
    assignments = experts.numel()
    num_blocks = max(1, triton.cdiv(assignments, BLOCK))
    ranks = torch.empty(assignments, dtype=torch.int32, device=experts.device)
    block_counts = torch.zeros(
        num_experts + 1, num_blocks, dtype=torch.int32, device=experts.device
    )
    sizes = (assignments, num_experts, num_blocks)
    with torch.cuda.device_of(experts):
        rank_kernel[(num_blocks,)](experts, ranks, block_counts, *sizes, BLOCK=BLOCK, num_warps=4)
        ends = block_counts.flatten().cumsum(0)
        destination_kernel[(triton.cdiv(max(assignments, num_experts), BLOCK),)](
            experts,
            ranks,
            block_counts,
            ends,
            destinations,
            counts,
            num_kept,
            *sizes,
            BLOCK=BLOCK,
            num_warps=2,
        )
    return destinations, counts, num_kept


@triton_permutation.register_fake
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_order(experts, num_experts)


@torch.library.custom_op("fulmen::permute", mutates_args=())
def triton_permute(x: Tensor, destinations: Tensor, num_kept: Tensor) -> Tensor:
    """`permute`, for fp32 or bf16; the hidden size a multiple of 8."""
    shape = (destinations.numel(), x.shape[1])
    rows = torch.empty(shape, dtype=x.dtype, device=x.device)
    arguments = (x.contiguous(), rows, destinations.contiguous(), num_kept)
    _run_by_token(permute_kernel, destinations, x.shape[1], *arguments)
    return rows


@triton_permute.register_fake
def _(x: Tensor, destinations: Tensor, num_kept: Tensor) -> Tensor:
    return torch.empty((destinations.numel(), x.shape[1]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("fulmen::unpermute", mutates_args=())
def triton_unpermute(
    rows: Tensor, weights: Tensor | None, destinations: Tensor, num_kept: Tensor
) -> Tensor:
    """`unpermute`, for fp32 or bf16; the hidden size a multiple of 8."""
    shape = (destinations.shape[0], rows.shape[1])
    out = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    _run_by_token(
        unpermute_kernel,
        destinations,
        rows.shape[1],
        rows.contiguous(),
        rows if weights is None else weights.contiguous(),
        out,
        destinations.contiguous(),
        num_kept,
        weights is not None,
    )
    return out


@triton_unpermute.register_fake
def _(rows: Tensor, weights: Tensor | None, destinations: Tensor, num_kept: Tensor) -> Tensor:
    shape = (destinations.shape[0], rows.shape[1])
    return torch.empty(shape, dtype=rows.dtype, device=rows.device)


@torch.library.custom_op("fulmen::unpermute_backward", mutates_args=())
def triton_unpermute_backward(
    d_out: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor, num_kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights, contiguous."""
    d_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    d_weights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    _run_by_token(
        unpermute_backward_kernel,
        destinations,
        rows.shape[1],
        d_out.contiguous(),
        rows.contiguous(),
        weights.contiguous(),
        d_rows,
        d_weights,
        destinations.contiguous(),
        num_kept,
    )
    return d_rows, d_weights


@triton_unpermute_backward.register_fake
def _(
    d_out: Tensor, rows: Tensor, weights: Tensor, destinations: Tensor, num_kept: Tensor
) -> tuple[Tensor, Tensor]:
    d_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    return d_rows, torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)


def _setup_permute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
    return triton_unpermute(d_rows, None, *ctx.saved_tensors), None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, destinations, num_kept = inputs
    # Without weights the gradient does not depend on the rows.
    ctx.save_for_backward(None if weights is None else rows, weights, destinations, num_kept)


def _unpermute_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    rows, weights, destinations, num_kept = ctx.saved_tensors
    if weights is None:
        return triton_permute(d_out, destinations, num_kept), None, None, None
    d_rows, d_weights = triton_unpermute_backward(d_out, rows, weights, destinations, num_kept)
    return d_rows, d_weights, None, None


triton_permute.register_autograd(_permute_backward, setup_context=_setup_permute)
triton_unpermute.register_autograd(_unpermute_backward, setup_context=_setup_unpermute)
