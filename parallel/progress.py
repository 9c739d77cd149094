"""Where this process is in a step, and what the others say when it does not go on.

A collective waits for all ranks of its group, so one rank that hangs or dies stops the others, and
torch only says that something timed out. Name what may wait, in either way, a line each:

    phase("backward")                          # from here to the next phase
    with exchange("LASP+ states", group): ...  # inside of a phase; may be nested

Both only set attributes of this process. A thread puts them into the store of the rendezvous each
second (`Watch`), and when they stand still for long, or when a collective fails, it reads those of
all ranks and says which ones are behind, have stopped, or are not heard of. A rank that fails sets
an alarm in the store, so that the others look before it is gone. Positions are compared
by step and by how many phases and exchanges began or ended in it, so each rank has to pass the same
ones: wrap a ring as a whole, not its sends, which a rank may skip.

With NCCL the host runs ahead of its device and the process waits at the next read of a result, in
the phase it is in by then, up to torch's own time limit, which ends the process without a Python
exception. The report is there before that: `REPORT_AT` of the limit.

With a report all ranks leave a dump (parallel/dumps.py). A process that still stands where it
stood at `END_AT` of the limit ends itself, also where it is the only one and nobody waits for it;
and one whose watch cannot run, because a thread that waits in the kernel holds Python's lock, is
ended by a thread of `faulthandler`, which needs no lock.
"""

import datetime
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import torch.distributed as dist

from fulmen.parallel.dumps import FOLDER, WRITE_S, Dumps, tell, within
from fulmen.parallel.rendezvous import name_ranks, of_attempt, open_store

log = logging.getLogger("fulmen")
Result = TypeVar("Result")

REPORT_AT = 0.8
"""Of the time limit of a collective."""
END_AT, END_LATER_S = 1.25, 10.0
"""Of that limit, and at least so many seconds after it: collectives end by themselves before."""
PATIENCE = 6.0
"""Times the limit outside of a step, and in the first one, which compiles kernels."""
CLOSING_S = 60.0
"""For what a process still does after a failure."""
EXIT_HUNG = 75
"""Status of a process that ended itself (EX_TEMPFAIL: try again)."""
_OF_A_STEP = ("data", "forward", "backward", "gradient norm", "optimiser", "statistics")
INTERVAL_S = 1.0
"""Between two signs of life."""
_SILENT_AFTER = 3
"""Intervals without a sign of life."""
START = -1
"""Stands for the number of a step before the first one."""
LEFT, GAVE_UP = "left the run", "gave up waiting"
_GLOO = ("gloo", "Connection closed by peer", "Connection reset", "Timed out", "Broken pipe")


class ExchangeError(RuntimeError):
    """A collective failed; the message says in which one and where each rank is."""


@dataclass
class _Position:
    """Written by whatever thread runs the step, read by the watch."""

    step: int = START
    steps: int = 0
    """That have begun in this process."""
    count: int = 0
    """Phases and exchanges of the step that have begun or ended."""
    name: str = "start-up"
    group: dist.ProcessGroup | None = None
    """Of the innermost exchange; None is the whole world, or nobody."""
    since: float = 0.0
    patient: bool = True
    """Whether it may take `PATIENCE` times as long as a part of a step."""


_HERE = _Position()


def phase(name: str, step: int | None = None) -> None:
    """This process goes on to something that is no part of what it did before."""
    if step is not None and step != _HERE.step:
        _HERE.step, _HERE.count, _HERE.steps = step, 0, _HERE.steps + 1
    _HERE.count += 1
    _HERE.name, _HERE.group, _HERE.since = name, None, time.monotonic()
    _HERE.patient = _HERE.steps <= 1 or name not in _OF_A_STEP


def expect_compilation() -> None:
    """The next step may take long, as the first one of a process: it compiles kernels."""
    _HERE.steps = 0


def place() -> str:
    """Where this process is, for people."""
    step = "before the first step" if _HERE.step == START else f"step {_HERE.step}"
    return f"{step}, in {_HERE.name!r} for {time.monotonic() - _HERE.since:.0f} s"


class exchange:  # noqa: N801 - reads as the verb
    """Names what runs inside; after a failure the position stays at the innermost one."""

    __slots__ = ("_group", "_name", "_outer")

    def __init__(self, name: str, group: dist.ProcessGroup | None = None) -> None:
        self._name, self._group = name, group

    def __enter__(self) -> None:
        here = _HERE
        self._outer = here.name, here.group
        here.count += 1
        here.name, here.group, here.since = self._name, self._group, time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            here = _HERE
            here.count += 1
            here.name, here.group = self._outer
            here.since = time.monotonic()


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life."""

    step: int
    count: int
    name: str
    beat: int
    """Number of the sign; it rises as long as the process lives."""
    sent: float
    """Wall-clock time."""
    end: str = ""
    """Why it is the rank's last one: an error of its own, `LEFT`, or `GAVE_UP`."""


def describe(signs: dict[int, Sign | None], silent: dict[int, float], asked: set[int]) -> str:
    """Where each rank is, a line for those at the same place, and who is missing.

    `silent` are the ranks whose last sign is so many seconds old; `asked` those of the exchange.
    """
    lost, waiting = set(), {}
    for rank, sign in signs.items():
        if sign is None or rank in silent or sign.end not in ("", GAVE_UP):
            lost.add(rank)
        else:
            waiting[rank] = (sign.step, sign.count)
    behind = {rank for rank, place in waiting.items() if place < max(waiting.values())}
    lines: dict[str, list[int]] = {}
    for rank, sign in signs.items():
        if sign is None:
            text = "no sign of life so far"
        else:
            text = f"in {sign.name} {_numbered(sign.step, sign.count)}"
            if rank in silent:
                text = f"not heard of for {silent[rank]:.0f} s, last {text}"
            elif rank in lost:
                text = f"{sign.end}, {text}"
            elif rank in behind:
                text = f"behind, {text}"
        lines.setdefault(text, []).append(rank)
    # Who is behind may itself wait for one that is lost.
    missing = (lost & asked) or lost or (behind & asked) or behind
    said = [f"{name_ranks(ranks)}: {text}" for text, ranks in lines.items()]
    if missing:
        said.append(f"missing: {name_ranks(missing)}")
    elif len(signs) > 1:
        said.append("all ranks are at the same place: look at the network and the devices")
    return "\n  ".join(said)


def _numbered(step: int, count: int) -> str:
    return f"(step {step}, position {count})" if step >= 0 else "(before the first step)"


@contextmanager
def watched(
    rank: int,
    world_size: int,
    timeout_s: float,
    *,
    run_dir: Path | None = None,
    patience_s: float = 0.0,
) -> Iterator[None]:
    """Watch over what runs inside; a collective that fails there becomes an `ExchangeError`.

    Args:
        timeout_s: time limit of a collective, and of a part of a step.
        run_dir: folder for dumps; None = none.
        patience_s: what is no part of a step may take so long, if that is above `PATIENCE` times
            the limit.
    """
    watch = Watch(rank, world_size, timeout_s, run_dir, patience_s)
    try:
        yield
    except Exception as error:
        with ends_within(CLOSING_S, "to tell the other ranks of a failure"):
            if not _is_of_a_collective(error):
                watch.stop_for(error)
                raise
            raise watch.explain(error) from error
    finally:
        watch.close()


def end_process(reason: str) -> NoReturn:
    """End this process, which cannot go on, at once: no thread is joined, nothing is cleaned up.

    The log, standard error, a dump, and the other ranks say why.
    """
    if _WATCH is not None:
        _WATCH.end(reason)
    tell(f"error: {reason}")
    within(WRITE_S, lambda: log.error("%s", reason))
    os._exit(EXIT_HUNG)


@contextmanager
def ends_within(seconds: float, what: str) -> Iterator[None]:
    """End the process if what runs inside takes longer."""
    reason = f"{what} took longer than {seconds:.0f} s: this process ends itself"
    timer = threading.Timer(seconds, end_process, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_of_a_collective(error: Exception) -> bool:
    is_gloo = isinstance(error, RuntimeError) and any(word in f"{error}" for word in _GLOO)
    return is_gloo or isinstance(error, dist.DistError)


_WATCH: "Watch | None" = None
"""Of this process, while it is watched."""


class Watch:
    """A thread that tells the other ranks where this one is, and reports when it stands still."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        run_dir: Path | None = None,
        patience_s: float = 0.0,
    ) -> None:
        global _WATCH
        store = open_store(timeout_s) if world_size > 1 else dist.HashStore()
        self._store = dist.PrefixStore(of_attempt("progress"), store)
        self._rank, self._ranks = rank, range(world_size)
        self._limit_s = REPORT_AT * timeout_s
        self._end_s = max(END_AT * timeout_s, timeout_s + END_LATER_S)
        self._patience_s = max(PATIENCE * timeout_s, patience_s)
        folder = None if run_dir is None else run_dir / FOLDER / self._agree_on_name()
        self._dumps = Dumps(folder, rank)
        self._dumped = False
        # An orphan would train on beside the processes that are started in its place.
        self._parent = os.getppid()
        self._beat = 0
        self._end = ""
        self._failed = False
        self._lost = ""
        """How the store failed."""
        self._seen = ""
        """Where the ranks were at the alarm."""
        # A connection serves one thread at a time, and one look at the ranks is enough.
        self._using, self._looking = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        phase("start-up", START)
        _HERE.steps = 0
        self._send()
        self._arm()
        self._thread.start()
        _WATCH = self

    def close(self) -> None:
        """End the thread; the others are told that this rank has left."""
        global _WATCH
        _WATCH = None
        self._stop.set()
        self._thread.join(WRITE_S)  # it may hang with the file system, as anything
        faulthandler.cancel_dump_traceback_later()
        if not self._end:
            self._end = LEFT
            self._send()

    def stop_for(self, error: Exception) -> None:
        """Tell the others that this rank stops for an error of its own."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        self._failed, self._end = True, f"stopped by {reason[:200]}"
        self._send()
        self._use_store(lambda: self._store.set("alarm", "1"))
        self._linger()

    def explain(self, error: Exception) -> ExchangeError:
        """A failed collective, with where all ranks are."""
        reason = f"{error}".strip().partition("\n")[0][:200]
        self._failed, place = True, self._place()
        self._use_store(lambda: self._store.set("alarm", "1"))
        self._dump(f"{place} failed")
        self._look_once()
        self._end = GAVE_UP
        self._send()
        self._linger()
        return ExchangeError(f"{place} failed: {reason}\n  {self._seen}{self._name_dumps()}")

    def end(self, reason: str) -> NoReturn:
        """Tell all who can hear it that this process ends, and end it."""
        self._failed, self._end = True, f"stopped: {reason}"[:200]
        text = f"rank {self._rank} is in {self._place()}: {reason}"
        tell(f"error: {text}{self._name_dumps()}")
        within(WRITE_S, self._alarm)
        self._dumps.write(reason)
        within(WRITE_S, lambda: log.error("%s%s", text, self._name_dumps()))
        within(WRITE_S, self._linger)
        os._exit(EXIT_HUNG)

    def _alarm(self) -> None:
        self._send()
        self._use_store(lambda: self._store.set("alarm", "1"))

    def _run(self) -> None:
        reported = None
        while not self._stop.wait(INTERVAL_S):
            self._arm()
            if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
                self.end("torchrun, which watches over it, has ended: so does this process")
            self._send()
            position = _HERE.step, _HERE.count
            waited = time.monotonic() - _HERE.since
            if waited >= (self._patience_s if _HERE.patient else self._end_s) and not self._failed:
                self.end(f"it stands still for {waited:.0f} s and ends itself")
            if waited >= self._limit_s and position != reported:
                reported = position
                headline = f"rank {self._rank} is in {self._place()} for {waited:.0f} s"
                if _HERE.steps == 1:
                    headline += " (the first step also compiles kernels)"
                self._use_store(lambda: self._store.set("dump", "1"))
                self._dump(headline)
                self._report(headline, self._look())
            elif not self._seen and self._use_store(lambda: self._store.check(["alarm"])):
                self._dump("another rank failed")
                self._look_once()
                if not self._failed:  # else its error says it
                    headline = f"a rank failed; rank {self._rank} is in {self._place()}"
                    self._report(headline, self._seen)
            elif not self._dumped and self._use_store(lambda: self._store.check(["dump"])):
                self._dump("another rank stands still")

    def _arm(self) -> None:
        """End the process if this is not called again, because no Python thread can run."""
        faulthandler.dump_traceback_later(self._end_s + END_LATER_S, exit=True, file=2)

    def _dump(self, why: str) -> None:
        self._dumped = True
        self._dumps.write(why)

    def _name_dumps(self) -> str:
        return "" if self._dumps.folder is None else f"\n  stacks: {self._dumps.folder}"

    def _agree_on_name(self) -> str:
        """The same folder for the dumps of all ranks of a start: its time."""
        now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        return self._store.compare_set("dumps", "", now).decode()

    def _report(self, headline: str, seen: str) -> None:
        if self._stop.is_set():
            return  # the run ended, as it had to or by an error that all ranks agree on
        text = f"{headline}\n  {seen}{self._name_dumps()}"
        logged = within(WRITE_S, lambda: log.error("%s", text))
        # Only rank 0 logs to the console.
        if not logged or (self._rank != 0 and "missing: rank 0" in text):
            tell(text)

    def _place(self) -> str:
        among = "" if _HERE.group is None else f" among {name_ranks(self._asked())}"
        return f"{_HERE.name}{among} {_numbered(_HERE.step, _HERE.count)}"

    def _asked(self) -> set[int]:
        if _HERE.group is None:
            return set(self._ranks)
        return set(dist.get_process_group_ranks(_HERE.group))

    def _look_once(self) -> None:
        with self._looking:
            self._seen = self._seen or self._look()

    def _look(self) -> str:
        """Where the ranks are. Looks twice: clocks of two machines need not agree."""
        asked, before = self._asked(), self._read()
        # Who died has sent a sign not long ago; see whose next one does not come.
        for _ in range(_SILENT_AFTER):
            time.sleep(INTERVAL_S)
            self._send()
        signs = self._read()
        if self._lost:
            return (
                f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where the "
                "ranks leave their positions, does not answer: the process of rank 0, or torchrun "
                f"beside it, has ended ({self._lost})\n  missing: rank 0"
            )
        silent = {
            rank: max(time.time() - sign.sent, _SILENT_AFTER * INTERVAL_S)
            for rank, sign in signs.items()
            if sign is not None and not sign.end and sign == before[rank] and rank != self._rank
        }
        return describe(signs, silent, asked)

    def _send(self) -> None:
        self._beat += 1
        here = _HERE
        sign = Sign(here.step, here.count, here.name, self._beat, time.time(), self._end)
        self._use_store(lambda: self._store.set(f"{self._rank}", json.dumps(asdict(sign))))

    def _read(self) -> dict[int, Sign | None]:
        return {rank: self._use_store(partial(self._read_one, rank)) for rank in self._ranks}

    def _read_one(self, rank: int) -> Sign | None:
        if not self._store.check([f"{rank}"]):
            return None
        return Sign(**json.loads(self._store.get(f"{rank}")))

    def _linger(self) -> None:
        """Rank 0 may keep the store in its process: let the others look before it ends."""
        deadline = time.monotonic() + (2 + _SILENT_AFTER) * INTERVAL_S
        while self._rank == 0 and not self._lost and time.monotonic() < deadline:
            if all(sign is not None and sign.end for sign in self._read().values()):
                return
            time.sleep(0.2)

    def _use_store(self, action: Callable[[], Result]) -> Result | None:
        with self._using:
            if self._lost:  # each further try would print a stack trace
                return None
            try:
                return action()
            except RuntimeError as error:
                self._lost = f"{error}".strip().partition("\n")[0]
                return None
