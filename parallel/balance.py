"""Which rank attends for which tokens of a row, so that in softmax layers all have as much to do.

A token sees its document from the start, so of one long document the first rank's part takes a
fraction of the work of the last one's. Where the contiguous split is uneven enough, the row is cut
into some chunks a rank, and each rank attends for chunks with much work and chunks with little; of
one long document these are the first chunk and the last, the second and the last but one, and so
on. Every rank plans alike from the documents' boundaries. Only softmax layers see it: tokens move
there and back. Positions are in the queries and keys by then.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.attention import Documents

EVEN_ENOUGH = 1.1
"""Work of the busiest rank over the mean up to which nothing more is done."""
WORTH_MOVING = 1024
"""Pairs of query and key a token that the busiest rank has more than the mean, to be worth it.

Forward and backward, a pair is 14 operations a number of the query, and a move of query, output and
their gradients 8 bytes: at 450 TFLOP/s and 300 GB/s a token moves in the time of 860 pairs.
"""
CHUNKS = (2, 4, 8)
"""Numbers of chunks a rank to try in turn. More chunks are more even, and more, smaller blocks."""


class Range(NamedTuple):
    """Tokens that lie side by side in the row, attended for by one rank."""

    start: int
    """First token, counted in the row."""
    end: int
    offset: int
    """Of the first token among the rank's own."""
    head: int
    """Leading tokens whose document began before the range."""
    head_document: int
    """Where in the row that document begins."""
    tail: int
    """Trailing tokens whose document goes on behind the range."""
    tail_document: int
    """Where in the row that document begins."""

    @property
    def tail_here(self) -> slice:
        """The tail among the rank's own tokens."""
        end = self.offset + self.end - self.start
        return slice(end - self.tail, end)


@dataclass(frozen=True, eq=False)
class Layout:
    """A row's chunks and who attends for them."""

    bounds: tuple[int, ...]
    """Of all documents of the row, from 0 to its end."""
    chunks: tuple[tuple[int, int], ...]
    """First token and end of each, in order; as many lie on each rank."""
    owned: tuple[tuple[int, ...], ...]
    """Chunks that each rank attends for, ascending."""
    ranges: tuple[tuple[Range, ...], ...]
    """The same of each rank, with chunks that meet joined."""

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.owned)

    @property
    def stays(self) -> bool:
        """Whether every rank attends for the tokens that lie on it."""
        return all(
            self.home(chunk) == rank for rank in range(self.size) for chunk in self.owned[rank]
        )

    def home(self, chunk: int) -> int:
        """The rank that a chunk lies on."""
        return chunk * self.size // len(self.chunks)

    def tokens_of(self, chunk: int) -> int:
        """Tokens of a chunk."""
        start, end = self.chunks[chunk]
        return end - start

    def lengths(self, rank: int) -> tuple[int, ...]:
        """Tokens of each document, or piece of one, in the ranges of `rank`."""
        lengths: list[int] = []
        for part in self.ranges[rank]:
            cuts = sorted({part.start, *_between(self.bounds, part.start, part.end), part.end})
            lengths += [b - a for a, b in pairwise(cuts)]
        return tuple(lengths)

    def work(self) -> list[int]:
        """Pairs of query and key that each rank computes."""
        of_chunk = [attention_work(self.bounds, *ends) for ends in self.chunks]
        return [sum(of_chunk[chunk] for chunk in mine) for mine in self.owned]


def attention_work(bounds: Sequence[int], start: int, end: int) -> int:
    """Pairs of query and key of the tokens from `start` to `end`: positions in documents, from 1.

    `bounds` are those of the documents.
    """
    first = bounds[bisect_right(bounds, start) - 1]
    total = 0
    for a, b in pairwise([start, *_between(bounds, start, end), end]):
        total += ((b - first) * (b - first + 1) - (a - first) * (a - first + 1)) // 2
        first = b
    return total


def imbalance(work: Sequence[int]) -> float:
    """The most over the mean; 1 is even."""
    return max(work) * len(work) / sum(work)


@lru_cache(maxsize=16)
def plan_layout(size: int, tokens: int, bounds: tuple[int, ...], balanced: bool) -> Layout:
    """The layout of a row of `size` parts of `tokens` each; kept for the layers of a model."""
    parts = [(rank * tokens, (rank + 1) * tokens) for rank in range(size)]
    best = _layout(bounds, parts, [[rank] for rank in range(size)])
    for per_rank in CHUNKS if balanced else ():
        if _is_even(best.work(), tokens):
            break
        chunks = [
            (start + tokens * i // per_rank, start + tokens * (i + 1) // per_rank)
            for start, _ in parts
            for i in range(per_rank)
        ]
        layout = _layout(bounds, chunks, _deal(bounds, chunks, size))
        best = min(best, layout, key=lambda layout: imbalance(layout.work()))
    return best


def _is_even(work: Sequence[int], tokens: int) -> bool:
    gain = max(work) - sum(work) / len(work)
    return imbalance(work) <= EVEN_ENOUGH or gain < WORTH_MOVING * tokens


def _deal(bounds: tuple[int, ...], chunks: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """As many chunks to each rank: that with the most work to the rank with the least so far."""
    work = [attention_work(bounds, *ends) for ends in chunks]
    hands: list[list[int]] = [[] for _ in range(size)]
    total = [0] * size
    for chunk in sorted(range(len(chunks)), key=lambda chunk: -work[chunk]):
        free = [rank for rank in range(size) if len(hands[rank]) < len(chunks) // size]
        rank = min(free, key=total.__getitem__)
        hands[rank].append(chunk)
        total[rank] += work[chunk]
    return sorted(sorted(hand) for hand in hands)


def _layout(
    bounds: tuple[int, ...], chunks: Sequence[tuple[int, int]], owned: Sequence[Sequence[int]]
) -> Layout:
    ranges = tuple(tuple(_ranges(bounds, [chunks[chunk] for chunk in mine])) for mine in owned)
    return Layout(bounds, tuple(chunks), tuple(tuple(mine) for mine in owned), ranges)


def _ranges(bounds: tuple[int, ...], chunks: Sequence[tuple[int, int]]) -> list[Range]:
    joined: list[tuple[int, int]] = []
    for start, end in chunks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    offset, ranges = 0, []
    for start, end in joined:
        if start == end:
            continue
        begins, ends = _document(bounds, start)
        head = min(ends, end) - start if begins < start else 0
        last_begins, last_ends = _document(bounds, end - 1)
        tail = end - max(last_begins, start) if last_ends > end else 0
        ranges.append(Range(start, end, offset, head, begins, tail, last_begins))
        offset += end - start
    return ranges


def _document(bounds: Sequence[int], token: int) -> tuple[int, int]:
    """First token and end of the document of `token`."""
    index = bisect_right(bounds, token)
    return bounds[index - 1], bounds[index]


def _between(bounds: Sequence[int], start: int, end: int) -> Sequence[int]:
    return bounds[bisect_right(bounds, start) : bisect_left(bounds, end)]


@lru_cache(maxsize=16)
def documents_of(layout: Layout, rank: int, device: torch.device) -> Documents:
    """Of what `rank` attends for; copied to the device once for all layers, without waiting."""
    lengths = layout.lengths(rank)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if device.type != "cpu":
        cu_seqlens = cu_seqlens.pin_memory().to(device, non_blocking=True)
    return Documents(lengths, cu_seqlens)


def to_layout(x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup) -> Tensor:
    """`[tokens, ...]` from where they lie to who attends for them; gradients come back."""
    return x if layout.stays else _Move.apply(x, layout, rank, group, False)


def from_layout(x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `to_layout`."""
    return x if layout.stays else _Move.apply(x, layout, rank, group, True)


class _Move(torch.autograd.Function):
    """Chunks to other ranks or home again; the gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup, home: bool
    ) -> Tensor:
        ctx.options = layout, rank, group, home
        return _move(x, layout, rank, group, home)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout, rank, group, home = ctx.options
        return _move(gradients[0], layout, rank, group, not home), None, None, None, None


def _move(x: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup, home: bool) -> Tensor:
    """One exchange. Both ends agree on the order: by chunk among those of one sender and receiver.

    What a rank attends for is ascending by chunk, so by the ranks where it lies; the chunks that
    lie on it go to ranks in any order.
    """
    owner = {chunk: other for other, mine in enumerate(layout.owned) for chunk in mine}
    lying = [chunk for chunk in sorted(owner) if layout.home(chunk) == rank]
    leaving = sorted(lying, key=lambda chunk: (owner[chunk], chunk))
    away, here = [0] * layout.size, [0] * layout.size
    for chunk in lying:
        away[owner[chunk]] += layout.tokens_of(chunk)
    for chunk in layout.owned[rank]:
        here[layout.home(chunk)] += layout.tokens_of(chunk)
    if home:
        moved = x.new_empty(sum(away), *x.shape[1:])
        dist.all_to_all_single(moved, x.contiguous(), away, here, group=group)
        return _reordered(moved, layout, leaving, lying)
    x = _reordered(x, layout, lying, leaving)
    moved = x.new_empty(sum(here), *x.shape[1:])
    dist.all_to_all_single(moved, x.contiguous(), here, away, group=group)
    return moved


def _reordered(x: Tensor, layout: Layout, old: list[int], new: list[int]) -> Tensor:
    """From the chunks `old` to the same ones in the order of `new`."""
    if old == new:
        return x
    pieces = dict(zip(old, x.split([layout.tokens_of(chunk) for chunk in old]), strict=True))
    return torch.cat([pieces[chunk] for chunk in new])
