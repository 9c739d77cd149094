"""Processes that a benchmark starts: whatever ends it, none of them is left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MARK = "FULMEN_BENCHMARK_CHILD"
PATIENCE_S = 5.0
SHOWN = 10_000
"""Characters of what a child said last."""


class Ended(NamedTuple):
    """How a child ended."""

    status: int | None
    """None beyond its time limit."""
    said: str
    """Standard output and error."""


def run_child(
    command: list[str], *, limit_s: float | None = None, env: Mapping[str, str] = os.environ
) -> Ended:
    """Run a command to its end or its time limit.

    Should this process end first, of SIGTERM for one (`end_at_sigterm`), what the child said last
    goes to standard error.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        # Not in this process' group: torchrun, asked twice to end, leaves its ranks.
        child = subprocess.Popen(
            command,
            env={**env, MARK: mark},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            end(child, mark)
            return Ended(None, said())
        except BaseException:
            end(child, mark)
            print(said()[-SHOWN:], file=sys.stderr, flush=True)
            raise
        return Ended(status, said())


def end(child: "subprocess.Popen[bytes]", mark: str) -> None:
    """Ask it to end, wait, then kill it and its own: torchrun's ranks are in sessions of theirs."""
    child.terminate()
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
    child.wait()
    for pid in find_marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended meanwhile


def find_marked(mark: str) -> list[int]:
    """Processes with this mark in the environment that they were started with."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if wanted in words:
            found.append(int(path.parent.name))
    return found


def end_at_sigterm() -> None:
    """Let SIGTERM raise `SystemExit`, so that what is open is closed."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: not out of the closing
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
