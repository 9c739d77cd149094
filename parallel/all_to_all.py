"""Rows of tokens between ranks, with gradients: an all-to-all in two halves.

The halves are a start and a wait. Their backward passes are a wait and a start,
so that what runs between the halves overlaps with the exchange in both directions. Exchanges of one
group are issued in the same order on every rank: forward as the code is written, backward by
autograd, which runs what was made last first.

Several exchanges may have their rows in one tensor (`Parts`), which they send from, and fill on the
way back, without a copy and with one node of autograd for all of them.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.parallel.progress import exchange

Room = Callable[[Tensor], Tensor]
"""Memory for rows that arrive, of the type of those given."""


class AllToAll:
    """One exchange of `[rows, hidden_size]` over a group, and the reverse one of its gradient."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: list[int],
        receive: list[int],
        rooms: tuple[Room | None, Room | None] = (None, None),
    ) -> None:
        """`send` and `receive` are the rows to and from each rank of the group.

        `rooms` are for what arrives forward and for its gradients; None is memory of its own.
        """
        self.is_alone = group.size() == 1
        self._group = group
        self._send, self._receive, self._rooms = send, receive, rooms
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    def reverse(self) -> "AllToAll":
        """The exchange that takes every row back to where it came from."""
        return AllToAll(self._group, self._receive, self._send, self._rooms[::-1])

    def start(self, rows: Tensor) -> Tensor:
        """Send; what is returned holds nothing yet and is for `wait` alone."""
        return rows if self.is_alone else _Start.apply(rows, self)

    def wait(self, arriving: Tensor) -> Tensor:
        """The rows, once they are there."""
        return arriving if self.is_alone else _Wait.apply(arriving, self)

    def issue(self, rows: Tensor, *, backward: bool) -> Tensor:
        """Begin one direction of it."""
        assert self._pending is None
        send, receive = (self._receive, self._send) if backward else (self._send, self._receive)
        rows, room = rows.contiguous(), self._rooms[backward]
        arriving = rows.new_empty(sum(receive), rows.shape[1]) if room is None else room(rows)
        work = dist.all_to_all_single(
            arriving, rows, receive, send, group=self._group, async_op=True
        )
        self._pending = work, rows, arriving  # the rows too: they are being read
        return arriving

    def finish(self) -> Tensor:
        """Wait for the direction that was begun; on a GPU it is the stream that waits."""
        assert self._pending is not None
        work, _, arriving = self._pending
        self._pending = None
        with exchange("rows for experts", self._group):
            work.wait()
        return arriving


class Parts:
    """Rows of several exchanges that lie one part behind another in one tensor on this rank.

    Rows behind the last part stay: nobody gets them, and what comes back holds anything there.
    """

    def __init__(self, sizes: list[int], num_rows: int) -> None:
        """`sizes` are the rows of each exchange, `num_rows` those of the tensor."""
        self._starts = list(accumulate(sizes, initial=0))
        self._sizes, self._num_rows = sizes, num_rows
        self._whole: Tensor | None = None

    def room(self, index: int, like: Tensor) -> Tensor:
        """Memory for what comes back by the exchange of this number."""
        if self._whole is None:
            self._whole = like.new_empty(self._num_rows, like.shape[1])
        # By `data`, because autograd forbids that views of one tensor change one after the other.
        return self._whole.data[self._starts[index] : self._starts[index + 1]]

    def start(self, rows: Tensor, exchanges: list[AllToAll]) -> list[Tensor]:
        """`AllToAll.start` of every part."""
        if exchanges[0].is_alone:
            return self.split(rows)
        return list(_StartParts.apply(rows, self, exchanges))

    def wait(self, arriving: list[Tensor], exchanges: list[AllToAll]) -> Tensor:
        """All of what came back, in one tensor."""
        if exchanges[0].is_alone:
            rest = arriving[0].new_empty(self._num_rows - self._starts[-1], arriving[0].shape[1])
            return torch.cat([*arriving, rest]) if self._is_split else arriving[0]
        return _WaitParts.apply(self, exchanges, *arriving)

    @property
    def _is_split(self) -> bool:
        return self._sizes != [self._num_rows]

    def split(self, rows: Tensor) -> list[Tensor]:
        """The part of each exchange."""
        if not self._is_split:
            return [rows]
        *parts, _ = rows.split([*self._sizes, self._num_rows - self._starts[-1]])
        return parts

    def finish(self, exchanges: list[AllToAll]) -> Tensor:
        """Wait for what comes back by all of them."""
        for one in exchanges:
            one.finish()
        whole, self._whole = self._whole, None
        assert whole is not None
        return whole


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.issue(rows, backward=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.issue(gradients[0], backward=True)
        return gradients[0], None  # in place of what is under way, whose shape is another


class _StartParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, parts: Parts, exchanges: list[AllToAll]
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.exchanges = parts, exchanges
        issued = zip(exchanges, parts.split(rows), strict=True)
        return tuple(one.issue(part, backward=False) for one, part in issued)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.parts.finish(ctx.exchanges), None, None


class _WaitParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, exchanges: list[AllToAll], *arriving: Tensor) -> Tensor:
        ctx.parts, ctx.exchanges = parts, exchanges
        return parts.finish(exchanges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts = ctx.parts.split(gradients[0])
        # The work on the last group was recorded last, so autograd comes to it first.
        for one, part in reversed(list(zip(ctx.exchanges, parts, strict=True))):
            one.issue(part, backward=True)
        return None, None, *parts  # in place of what is under way, as above
