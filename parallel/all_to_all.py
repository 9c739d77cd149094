"""Rows of tokens between ranks, with gradients: an all-to-all in two halves.

The halves are a start and a wait. Their backward passes are a wait and a start,
so that what runs between the halves overlaps with the exchange in both directions. Exchanges of one
group are issued in the same order on every rank: forward as the code is written, backward by
autograd, which runs what was made last first.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.parallel.progress import exchange


class AllToAll:
    """One exchange of `[rows, hidden_size]` over a group, and the reverse one of its gradient."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        """`send` and `receive` are the rows to and from each rank of the group."""
        self._group = group
        self._send, self._receive = send, receive
        self._pending: tuple[Any, Tensor, Tensor] | None = None

    def reverse(self) -> "AllToAll":
        """The exchange that takes every row back to where it came from."""
        return AllToAll(self._group, self._receive, self._send)

    def start(self, rows: Tensor) -> Tensor:
        """Send; what is returned holds nothing yet and is for `wait` alone."""
        return rows if self._group.size() == 1 else _Start.apply(rows, self)

    def wait(self, arriving: Tensor) -> Tensor:
        """The rows, once they are there."""
        return arriving if self._group.size() == 1 else _Wait.apply(arriving, self)

    def issue(self, rows: Tensor, *, backward: bool) -> Tensor:
        """Begin one direction of it."""
        assert self._pending is None
        send, receive = (self._receive, self._send) if backward else (self._send, self._receive)
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), rows.shape[1])
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
