"""What a process leaves behind when it does not go on: stacks, threads, collectives.

RUN/dumps/<time of the start>/ gets of each rank

    rank<R>.txt              why, its threads with the state the kernel has them in, the Python
                             stack of each, the last collectives
    nccl_trace_rank_<R>      torch's flight recorder of NCCL, of gloo: `torchfrtrace` reads a folder
    gloo_trace_rank_<R>      of them (docs/operations.md)

Nothing here may hang or raise, whatever the file system does: text is gathered in memory, and what
may wait is done `within` a time limit. At most `MOST` dumps a process and `FOLDERS` folders.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d

FOLDER = "dumps"
"""Of a run's folder."""
MOST = 3
"""Dumps of one process."""
FOLDERS = 10
"""Newest folders that are kept."""
WRITE_S = 5.0
"""Time limit of a dump, and of a line of the log."""
_LAST = 20
"""Collectives that the text shows."""
_THREADS = 200
_RECORDERS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}
"""By backend; a build of torch has one or both."""


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Whether `action`, in a thread of its own, ended in so many seconds without an error."""
    ended: list[bool] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            action()
            ended.append(True)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(ended)


def tell(text: str) -> None:
    """Put text on standard error, whoever holds the locks of Python's own stream."""
    within(1.0, lambda: os.write(2, f"{text}\n".encode()))


class Dumps:
    """The dumps of one rank; `folder` is the same on all ranks of a start, None = write none."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.folder = folder
        self._rank = rank
        self._written = 0
        self._writing = threading.Lock()

    def write(self, why: str) -> None:
        """Leave a dump, if there is room for one more; takes at most `WRITE_S`.

        Where the folder does not take it, standard error gets the stacks.
        """
        if self.folder is None or self._written >= MOST:
            return
        folder, text = self.folder, describe_process(f"rank {self._rank}: {why}")
        if not within(WRITE_S, lambda: self._write(folder, text)):
            tell(f"{folder} could not be written; stacks:\n{text}")

    def _write(self, folder: Path, text: str) -> None:
        with self._writing:
            self._written += 1
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                delete_old(folder.parent)
            suffix = "" if self._written == 1 else f"-{self._written}"
            path = folder / f"rank{self._rank}{suffix}.txt"
            path.write_text(text)
            # By itself and last: it takes locks of torch's.
            traces = read_flight_recorders()
            for backend, trace in traces.items():
                (folder / f"{backend}_trace_rank_{self._rank}").write_bytes(trace)
            with path.open("a") as file:
                file.write(describe_collectives())


def delete_old(folder: Path) -> None:
    """Delete all but the newest dumps of a run; their names are times."""
    for path in sorted(path for path in folder.iterdir() if path.is_dir())[:-FOLDERS]:
        shutil.rmtree(path, ignore_errors=True)


def describe_process(headline: str) -> str:
    """Threads and their stacks, the most recent call first."""
    return "\n".join(
        [
            f"{time.strftime('%F %T')} {headline}",
            f"process {os.getpid()} on {socket.gethostname()}",
            "",
            *_threads(),
            "",
            _stacks(),
        ]
    )


def _threads() -> list[str]:
    """A line for each thread; D is a wait in the kernel that nothing ends, often a file system."""
    names = {thread.native_id: thread for thread in threading.enumerate()}
    lines = []
    for number in sorted(int(name) for name in os.listdir("/proc/self/task"))[:_THREADS]:
        folder = Path("/proc/self/task", str(number))
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            line = f"task {number} ({name}): {rest.split()[0]}"
            place = (folder / "wchan").read_text().strip("\0\n")
            if place not in ("", "0"):
                line += f" in {place}"
            if number in names:
                line += f", Python thread {names[number].name} 0x{names[number].ident or 0:016x}"
            lines.append(line)
    return lines


def _stacks() -> str:
    """Of all Python threads, without a look at any source file."""
    file = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        os.lseek(file, 0, os.SEEK_SET)
        with os.fdopen(file, closefd=False) as stream:
            return stream.read()
    finally:
        os.close(file)


def read_flight_recorders() -> dict[str, bytes]:
    """What torch has recorded of its collectives, by backend, as `torchfrtrace` reads it."""
    traces = {}
    for backend, name in _RECORDERS.items():
        dump = getattr(c10d, name, None)
        if dump is not None:
            traces[backend] = dump()
    return traces


def describe_collectives() -> str:
    """The last collectives, a line each, those that have not ended marked."""
    lines = []
    for backend, name in _RECORDERS.items():
        dump = getattr(c10d, f"{name}_json", None)
        if dump is None:
            continue
        entries: list[dict[str, Any]] = json.loads(dump()).get("entries", [])
        if entries:
            lines.append(f"\nthe last of {len(entries)} collectives of {backend}")
        for entry in entries[-_LAST:]:
            ended = entry.get("retired") or entry.get("state") == "completed"
            lines.append(
                f"  {entry.get('profiling_name')} {entry.get('collective_seq_id')} of group "
                f"{' '.join(map(str, entry.get('process_group', [])))}, sizes "
                f"{entry.get('input_sizes')}: {entry.get('state')}"
                f"{'' if ended else ', HAS NOT ENDED'}"
            )
    return "\n".join(lines) + "\n" if lines else ""
