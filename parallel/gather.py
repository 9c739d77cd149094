"""Softmax attention over the keys and values of the whole row, gathered on every rank.

One gather forward, one reduce-scatter of fp32 gradients backward. Simpler than the ring, and the
library's kernels get few, large blocks; but each rank holds the row's keys and values, until the
layer's backward pass, and then their gradients.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype
from fulmen.parallel.balance import Layout, documents_of
from fulmen.parallel.collectives import all_gather, reduce_scatter
from fulmen.parallel.progress import exchange
from fulmen.parallel.tiles import Attended, Gradients, Tile


@lru_cache(maxsize=16)
def plan_gather(layout: Layout, rank: int) -> tuple[Tile, ...]:
    """Queries whose document began before their range, and its keys from there, in the row."""
    return tuple(
        Tile(slice(part.offset, part.offset + part.head), slice(part.head_document, part.start))
        for part in layout.ranges[rank]
        if part.head
    )


def gather_attention(
    q: Tensor, kv: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of the tokens that `rank` attends for to all of their documents before.

    `q` is `[tokens, heads, head_dim]`, of these tokens; `kv` `[tokens, 2 kv_heads, head_dim]`, of
    the tokens that lie on this rank.
    """
    return _Gather.apply(q, kv, layout, rank, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup
    ) -> Tensor:
        documents = documents_of(layout, rank, q.device)
        row = kv.new_empty(layout.size * kv.shape[0], *kv.shape[1:])
        with exchange("keys and values of the row", group):
            gathering = all_gather(row, kv, group=group, async_op=True)
            if layout.stays:
                attended = Attended(q, kv, documents)  # while the others' keys come
            gathering.wait()
        if not layout.stays:
            attended = Attended(q, _own(row, layout, rank), documents)
        attended.add(row, plan_gather(layout, rank))
        out, lse = attended.result()
        ctx.options = layout, rank, group, documents
        ctx.save_for_backward(q, row, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, row, out, lse = ctx.saved_tensors
        layout, rank, group, documents = ctx.options
        sums = Gradients(gradients[0], q, out, lse)
        dtype = accumulation_dtype(row)
        d_row = torch.zeros_like(row, dtype=dtype)
        kv = _own(row, layout, rank)
        d_kv = torch.zeros_like(kv, dtype=dtype)
        sums.own(kv, d_kv, documents)
        sums.add(row, d_row, plan_gather(layout, rank))
        for part in layout.ranges[rank]:
            d_row[part.start : part.end] += d_kv[part.offset :][: part.end - part.start]
        d_kv = d_row.new_empty(d_row.shape[0] // layout.size, *d_row.shape[1:])
        with exchange("gradients of keys and values", group):
            reduce_scatter(d_kv, d_row, group=group)
        return sums.dq.to(q.dtype), d_kv.to(row.dtype), None, None, None


def _own(row: Tensor, layout: Layout, rank: int) -> Tensor:
    """The tokens that `rank` attends for; a view where they are in one piece."""
    parts: Sequence[Tensor] = [row[part.start : part.end] for part in layout.ranges[rank]]
    return parts[0] if len(parts) == 1 else torch.cat([row[:0], *parts])
