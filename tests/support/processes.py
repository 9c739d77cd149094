"""launch/pretrain.py in processes of its own, which can be killed."""

import gc
import json
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from support import HANG_S
from support.tiny import ROOT
from support.worlds import CONTEXT, free_port, rank_environment

SCRIPT = str(ROOT / "launch" / "pretrain.py")


def start(size: int, arguments: Sequence[str], log: Path) -> list[BaseProcess]:
    """The ranks of a run; a world of one gets no environment, like a plain command."""
    port = free_port()
    ranks: list[BaseProcess] = []
    for rank in range(size):
        environment = rank_environment(rank, size, port) if size > 1 else {}
        output = log / f"rank{rank}.txt"
        process = CONTEXT.Process(target=_run_script, args=(environment, arguments, output))
        process.start()
        ranks.append(process)
    return ranks


def _run_script(environment: dict[str, str], arguments: Sequence[str], output: Path) -> None:
    gc.freeze()  # as in support.worlds
    os.environ.update(environment)
    os.chdir(ROOT)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def finish(ranks: list[BaseProcess], log: Path, *, timeout_s: float = HANG_S) -> None:
    """Wait for all ranks; whatever happens, none is left behind."""
    deadline = time.monotonic() + timeout_s
    try:
        for rank in ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
    finally:
        kill(ranks)
    said = "\n".join(path.read_text()[-3000:] for path in sorted(log.glob("rank*.txt")))
    assert codes == [0] * len(ranks), said


def kill(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


def kill_at(
    ranks: list[BaseProcess], step: int, metrics: Path, *, timeout_s: float = HANG_S
) -> None:
    """SIGKILL every rank as soon as `step` is logged."""
    deadline = time.monotonic() + timeout_s
    try:
        while last_step(metrics) < step:
            assert time.monotonic() < deadline, f"step {step} never came"
            assert all(rank.is_alive() for rank in ranks), "ended before it was killed"
            time.sleep(0.01)
    finally:
        kill(ranks)
