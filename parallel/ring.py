"""Ring attention on a packed row: keys and values travel from rank to rank, queries stay.

In step s a rank works on keys and values that lie on the rank s places before it in the ring, while
those of the next step are on their way. Of another rank's tokens only those can be of use whose
document goes on behind them: the tails of its ranges (balance.py). So tails alone travel, and only
as far as a later rank needs them; that follows from the boundaries, so senders and receivers agree
without asking. Outputs are merged by log-sum-exp. In the backward pass the tails travel again, and
behind them their fp32 gradients, each rank adding its part; the last one sends them home.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype
from fulmen.parallel.balance import Layout, Range, documents_of
from fulmen.parallel.progress import exchange
from fulmen.parallel.tiles import Attended, Gradients, Tile


@dataclass(frozen=True, eq=False)
class RingPlan:
    """What one rank does in each step, and what all send."""

    rank: int
    tails: tuple[slice, ...]
    """Of this rank's tokens, what travels."""
    tiles: tuple[tuple[Tile, ...], ...]
    """By step: what this rank's queries make of the tails that it then holds."""
    tokens: tuple[int, ...]
    """Of each rank's tails."""
    reach: tuple[int, ...]
    """Steps that each rank's tails go along the ring: to the last rank that needs them."""

    @property
    def size(self) -> int:
        """Ranks in the ring."""
        return len(self.reach)

    def ahead(self, steps: int) -> int:
        """The rank so many places along the ring; negative: before this one."""
        return (self.rank + steps) % self.size


@lru_cache(maxsize=16)
def plan_ring(layout: Layout, rank: int) -> RingPlan:
    """The steps of `rank`."""
    size = layout.size
    heads: list[dict[int, list[Range]]] = [defaultdict(list) for _ in range(size)]
    for other, ranges in enumerate(layout.ranges):
        for part in ranges:
            if part.head:
                heads[other][part.head_document].append(part)
    reach = []
    for source, ranges in enumerate(layout.ranges):
        steps = range(size - 1, 0, -1)
        needed = (s for s in steps if _tiles(heads[(source + s) % size], ranges))
        reach.append(next(needed, 0))
    return RingPlan(
        rank=rank,
        tails=tuple(part.tail_here for part in layout.ranges[rank] if part.tail),
        tiles=tuple(
            tuple(_tiles(heads[rank], layout.ranges[(rank - step) % size])) for step in range(size)
        ),
        tokens=tuple(sum(part.tail for part in ranges) for ranges in layout.ranges),
        reach=tuple(reach),
    )


def _tiles(heads: Mapping[int, Sequence[Range]], theirs: Sequence[Range]) -> list[Tile]:
    """Heads, by document, with the tails of `theirs` that they see."""
    tiles, offset = [], 0
    for keys in theirs:
        here = slice(offset, offset + keys.tail)
        offset += keys.tail
        for part in heads.get(keys.tail_document, ()) if keys.tail else ():
            if keys.end <= part.start:
                tiles.append(Tile(slice(part.offset, part.offset + part.head), here))
    return tiles


def ring_attention(
    q: Tensor, kv: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of the tokens that `rank` attends for to all of their documents before.

    `q` is `[tokens, heads, head_dim]`, `kv` `[tokens, 2 kv_heads, head_dim]`, both of these tokens.
    """
    return _Ring.apply(q, kv, layout, rank, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, layout: Layout, rank: int, group: dist.ProcessGroup
    ) -> Tensor:
        plan = plan_ring(layout, rank)
        ctx.options = plan, documents_of(layout, rank, q.device), group
        tails: Tensor | None = _joined(kv, plan.tails)
        with exchange("keys around the ring", group):
            for step in range(plan.size):
                transfer = _pass_on(plan, group, step, kv, tails)
                if step == 0:
                    attended = Attended(q, kv, ctx.options[1])
                if tails is not None:
                    attended.add(tails, plan.tiles[step])
                tails = transfer.wait()
        out, lse = attended.result()
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        plan, documents, group = ctx.options
        sums = Gradients(gradients[0], q, out, lse)
        dtype = accumulation_dtype(kv)
        d_kv = torch.zeros_like(kv, dtype=dtype)
        own = _joined(kv, plan.tails)
        tails: Tensor | None = own
        d_own = torch.zeros_like(own, dtype=dtype)
        d_home = torch.empty_like(d_own)
        behind = _Transfer()
        with exchange("keys and their gradients around the ring", group):
            for step in range(plan.size):
                transfer = _pass_on(plan, group, step, kv, tails)
                d_tails = d_own
                if step == 0:
                    sums.own(kv, d_kv, documents)
                elif tails is not None:
                    d_tails = torch.zeros_like(tails, dtype=dtype)
                if tails is not None:
                    sums.add(tails, d_tails, plan.tiles[step])
                arrived = behind.wait()
                if arrived is not None:
                    d_tails += arrived
                behind = _pass_back(plan, group, step, d_tails, d_home)
                tails = transfer.wait()
            behind.wait()
        if plan.reach[plan.rank]:
            d_own += d_home
        for here, part in zip(plan.tails, d_own.split(_sizes(plan.tails)), strict=True):
            d_kv[here] += part
        return sums.dq.to(q.dtype), d_kv.to(kv.dtype), None, None, None


@dataclass(frozen=True)
class _Transfer:
    """Sends and receives under way."""

    works: Sequence[dist.Work] = ()
    arriving: Tensor | None = None
    sent: Tensor | None = None
    """Kept until it has gone."""

    def wait(self) -> Tensor | None:
        """What arrived; on GPUs the stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.arriving


def _pass_on(
    plan: RingPlan, group: dist.ProcessGroup, step: int, kv: Tensor, tails: Tensor | None
) -> _Transfer:
    """Send the tails of `step` along the ring, and receive those of the next one."""
    ops, arriving = [], None
    if plan.reach[plan.ahead(-step)] > step:
        assert tails is not None
        ops.append(_op(dist.isend, tails, plan.ahead(1), group, step))
    source = plan.ahead(-step - 1)
    if plan.reach[source] > step:
        arriving = kv.new_empty(plan.tokens[source], *kv.shape[1:])
        ops.append(_op(dist.irecv, arriving, plan.ahead(-1), group, step))
    return _transfer(ops, arriving, tails)


def _pass_back(
    plan: RingPlan, group: dist.ProcessGroup, step: int, d_tails: Tensor, d_home: Tensor
) -> _Transfer:
    """Send the gradients of the tails of `step` behind them, or home from where these end.

    `d_home` receives those of this rank's tails in the step in which they come.
    """
    if step == 0:
        return _Transfer()
    ops, arriving, tag = [], None, plan.size + step
    source = plan.ahead(-step)
    if plan.reach[source] >= step:
        to = plan.ahead(1) if plan.reach[source] > step else source
        ops.append(_op(dist.isend, d_tails, to, group, tag))
    source = plan.ahead(-step - 1)
    if plan.reach[source] > step:
        arriving = d_home.new_empty(plan.tokens[source], *d_home.shape[1:])
        ops.append(_op(dist.irecv, arriving, plan.ahead(-1), group, tag))
    if plan.reach[plan.rank] == step:
        ops.append(_op(dist.irecv, d_home, plan.ahead(step), group, tag))
    return _transfer(ops, arriving, d_tails)


def _op(
    send_or_receive: Any, tensor: Tensor, rank: int, group: dist.ProcessGroup, tag: int
) -> dist.P2POp:
    return dist.P2POp(send_or_receive, tensor, dist.get_global_rank(group, rank), group, tag)


def _transfer(ops: list[dist.P2POp], arriving: Tensor | None, sent: Tensor | None) -> _Transfer:
    return _Transfer(dist.batch_isend_irecv(ops) if ops else (), arriving, sent)


def _joined(x: Tensor, parts: Sequence[slice]) -> Tensor:
    """Those tokens of `x`; a view where they are in one piece."""
    return x[parts[0]] if len(parts) == 1 else torch.cat([x[:0], *(x[part] for part in parts)])


def _sizes(parts: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]
