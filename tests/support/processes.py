"""launch/pretrain.py in processes of its own, which can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from support.tiny import ROOT
from support.worlds import free_port, rank_environment

SCRIPT = str(ROOT / "launch" / "pretrain.py")
TIMEOUT_S = 90


def start(size: int, arguments: Sequence[str], log: Path) -> list[subprocess.Popen]:
    """The ranks of a run; a world of one gets no environment, like a plain command."""
    port = free_port()
    ranks = []
    for rank in range(size):
        environment = dict(os.environ)
        if size > 1:
            environment |= rank_environment(rank, size, port)
        with (log / f"rank{rank}.txt").open("ab") as output:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, SCRIPT, *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
    return ranks


def finish(ranks: list[subprocess.Popen], log: Path, *, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for all ranks; whatever happens, none is left behind."""
    deadline = time.monotonic() + timeout_s
    try:
        codes = [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]
    finally:
        kill(ranks)
    said = "\n".join(path.read_text()[-3000:] for path in sorted(log.glob("rank*.txt")))
    assert codes == [0] * len(ranks), said


def kill(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)


def kill_at(
    ranks: list[subprocess.Popen], step: int, metrics: Path, *, timeout_s: float = TIMEOUT_S
) -> None:
    """SIGKILL every rank as soon as `step` is logged."""
    deadline = time.monotonic() + timeout_s
    try:
        while last_step(metrics) < step:
            assert time.monotonic() < deadline, f"step {step} never came"
            assert all(rank.poll() is None for rank in ranks), "ended before it was killed"
            time.sleep(0.002)
    finally:
        kill(ranks)
