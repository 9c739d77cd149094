"""Tensors that wait for the backward pass in pinned host memory.

A tensor leaves by a stream of its own, behind the work that made it and beside the work that reads
it. Its GPU memory is given up when the next tensor comes to leave: only then the compute stream
waits for the copy, which has long been done. Backward the order is the reverse: whoever gets a
tensor also has the one before it sent for, so that the copy runs beside the work that lies between.
So two of them are on the GPU at most, the host waits for nothing, and one stream orders all copies,
which lets the host buffers be used again as soon as nobody refers to their content.

Buffers are made of powers of two, for torch's pinned allocator rounds up to one. On CPUs nothing is
copied.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SMALLEST_PIECE = 2**20


class Kept:
    """A tensor that is kept where it is; and what `HostMemory` makes of it."""

    def __init__(self, x: Tensor) -> None:
        self._here: Tensor | None = x

    def get(self) -> Tensor:
        """The values, as a tensor that needs a gradient if the first one did."""
        assert self._here is not None
        return self._here

    def leave(self) -> None:
        """Give up the GPU's memory, after the forward work that reads it has been issued."""


def keep_here(x: Tensor) -> Kept:
    """Nothing leaves."""
    return Kept(x)


class HostMemory:
    """The host side of one model's kept tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: dict[int, list[Tensor]] = {}
        # The graph alone decides how long a tensor lives.
        self.newest: weakref.ref[Offloaded] | None = None
        self.leaving: weakref.WeakSet[Offloaded] = weakref.WeakSet()
        """At most one, whose GPU memory is not given up yet."""
        self.arrived: weakref.WeakSet[Offloaded] = weakref.WeakSet()
        """At most the one in use and the one before it."""

    def keep(self, x: Tensor) -> Kept:
        """Begin the way of `x` to the host."""
        if self.copies is None:
            return Kept(x)
        kept = Offloaded(x, self)
        self.newest = weakref.ref(kept)
        return kept

    def take(self, nbytes: int) -> list[Tensor]:
        """Pinned buffers that have room for so many bytes together."""
        buffers = []
        for size in piece_sizes(nbytes):
            free = self._free.setdefault(size, [])
            new = not free
            buffers.append(
                torch.empty(size, dtype=torch.uint8, pin_memory=True) if new else free.pop()
            )
        return buffers

    def give_back(self, buffers: list[Tensor]) -> None:
        """They may be written to by later copies, which this stream orders behind earlier ones."""
        for buffer in buffers:
            self._free[buffer.nbytes].append(buffer)


def piece_sizes(nbytes: int) -> Iterator[int]:
    """Powers of two that add up to `nbytes`, or a little more."""
    pieces = -(-nbytes // SMALLEST_PIECE)
    for bit in reversed(range(pieces.bit_length())):
        if pieces >> bit & 1:
            yield SMALLEST_PIECE << bit


class Offloaded(Kept):
    """A tensor on its way to the host and back."""

    def __init__(self, x: Tensor, host: HostMemory) -> None:
        super().__init__(x)
        self._host = host
        self._before = host.newest
        self._shape, self._dtype, self._needs_grad = x.shape, x.dtype, x.requires_grad
        values = x.detach()
        assert values.is_contiguous(), "activations are kept as they were made"
        self._device = x.device
        self._buffers = host.take(values.nbytes)
        self._copied = self._copy(values, to_host=True)
        weakref.finalize(self, host.give_back, self._buffers)

    def get(self) -> Tensor:
        """As in `Kept`; on the current stream. The one that left before it is sent for too."""
        before = None if self._before is None else self._before()
        wanted = [self] if before is None else [self, before]
        for kept in wanted:
            kept._send_for()
        for other in set(self._host.arrived) - set(wanted):
            other._here = None
        self._host.arrived = weakref.WeakSet(wanted)
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        assert self._here is not None
        return self._here

    def leave(self) -> None:
        """As in `Kept`; what began to leave before this one is given up."""
        for other in set(self._host.leaving) - {self}:
            torch.cuda.current_stream(self._device).wait_event(other._copied)
            other._here = None
        self._host.leaving = weakref.WeakSet([self])

    def _send_for(self) -> None:
        if self._here is not None:
            return
        # A selective checkpoint looks for each op of its second pass in the first one.
        with _disable_current_modes():
            values = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(values, to_host=False)
            self._here = values.requires_grad_(self._needs_grad)

    def _copy(self, values: Tensor, *, to_host: bool) -> torch.cuda.Event:
        """On the stream of copies, behind what the current stream has been given so far."""
        stream = self._host.copies
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        content = values.view(-1).view(torch.uint8)
        with torch.cuda.stream(stream):
            first = 0
            for buffer in self._buffers:
                part = content[first : first + buffer.nbytes]
                pinned = buffer[: part.nbytes]
                if to_host:
                    pinned.copy_(part, non_blocking=True)
                else:
                    part.copy_(pinned, non_blocking=True)
                first += buffer.nbytes
            copied = torch.cuda.Event()
            copied.record(stream)
        return copied
