"""A run that is asked to stop: it finishes the step, saves, and ends normally.

Who may ask: whoever makes a file `STOP` in the run's folder (a job script before its time limit, or
a person by hand), and SIGTERM, SIGUSR1 or Ctrl-C to any of the processes. torchrun passes signals
on and ends them by force some 30 s later, so what takes longer is asked for by the file. Ctrl-C
once more ends a process at once.

All ranks have to stop at the same step, also where one of them has found that a checkpoint could
not be written: one that stopped alone would leave the others in a collective. Before each step
every rank begins a sum of two numbers over gloo, and it reads the result after the step: nobody
waits for a GPU, and for another host only if that one is a whole step behind.
"""

import datetime
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fulmen.parallel.progress import exchange
from fulmen.trainer.run_log import log

STOP = "STOP"
"""File in the run's folder; it stays there until somebody takes it away."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ONCE_S = 2.0
"""The terminal and torchrun both send SIGINT for one Ctrl-C; a later one is another."""


class Stop:
    """Listens from the first `poll` to `close`; every rank of the world makes one."""

    def __init__(self, run_dir: Path, timeout_s: float) -> None:
        self.asked = False
        """Whether any rank was asked, as all of them know after a step."""
        self.failed = False
        """Whether any rank has found that the run cannot go on, as all know after a step."""
        self._file = run_dir / STOP
        limit = datetime.timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=limit)
        self._is_first = dist.get_rank() == 0
        self._wishes = torch.zeros(2)
        self._pending: dist.Work | None = None
        self._signal = ""
        self._interrupted_s: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def poll(self, *, failed: bool = False) -> None:
        """Tell the other ranks, before a step, whether this one is asked to stop, or has failed."""
        # Before the first step there is nothing to save, and a signal may end the process.
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        # One look at a shared file system a step is enough; signals come to any rank.
        wish = bool(self._signal) or (self._is_first and self._file.exists())
        self._wishes.copy_(torch.tensor([wish, failed]))
        self._pending = dist.all_reduce(self._wishes, group=self._group, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank was asked before this step; called once after it, by all."""
        assert self._pending is not None
        with exchange("wishes to stop"):
            self._pending.wait()
        self._pending = None
        self.asked, self.failed = self._wishes.bool().tolist()
        if self.asked:
            by = self._signal or (str(self._file) if self._file.exists() else "another rank")
            log.info("asked to stop by %s: the run saves and ends", by)
        return self.asked

    def asked_since(self) -> bool:
        """Whether any rank was asked since the last step began; for all, between steps."""
        self.poll()
        return self.agreed()

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_s is not None and now > self._interrupted_s + _ONCE_S:
                raise KeyboardInterrupt
            self._interrupted_s = self._interrupted_s or now
