"""A run under torchrun, what can be done to it, and a small disk that fills up and freezes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.processes import SCRIPT
from support.tiny import ROOT

from fulmen.trainer.checkpoint import step_of
from fulmen.trainer.manifest import CheckpointError, verify

PATIENCE_S = 120.0


class Disk:
    """A file system of its own, of 48 MiB, in a file; mounting needs root."""

    def __init__(self, folder: Path) -> None:
        image, self.root = folder / "disk.img", folder / "disk"
        self.root.mkdir()
        with image.open("wb") as file:
            file.truncate(48 * 2**20)
        for command in (
            ["mkfs.ext4", "-q", "-m", "0", str(image)],
            ["mount", "-o", "loop", str(image), str(self.root)],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        self.thaw()
        subprocess.run(["umount", "-l", str(self.root)], check=True)

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.root / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def free(self) -> None:
        (self.root / "filler").unlink(missing_ok=True)

    def freeze(self) -> None:
        """Whoever writes waits in the kernel from now on, and no signal ends that."""
        subprocess.run(["fsfreeze", "-f", str(self.root)], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "-u", str(self.root)], check=False, capture_output=True)


class Job:
    """A run's processes: torchrun and two ranks, started again and again."""

    def __init__(self, run_dir: Path, arguments: list[str], logs: Path) -> None:
        self.run_dir, self._arguments, self._logs = run_dir, arguments, logs
        self.starts = 0
        self.newest = 0
        """Step of the newest whole checkpoint so far."""
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    @property
    def done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    @property
    def alive(self) -> bool:
        return self._torchrun is not None and self._torchrun.poll() is None

    @property
    def step(self) -> int:
        """The last one that is logged."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        return max(
            (json.loads(line)["step"] for line in lines[1:] if line.endswith(b"}")), default=0
        )

    @property
    def output(self) -> str:
        """Of the last start."""
        return (self._logs / f"start{self.starts}.txt").read_text(errors="replace")

    def start(self) -> None:
        """Start torchrun; all processes of the start before are gone."""
        self.check_checkpoints()
        self.starts += 1
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", SCRIPT, *self._arguments]
        with (self._logs / f"start{self.starts}.txt").open("wb") as file:
            self._torchrun = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._seen = {self._torchrun.pid}

    @property
    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks."""
        assert self._torchrun is not None
        pid, found = self._torchrun.pid, {}
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                for entry in environment:
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(child)
        self._seen |= set(found.values())
        return found

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.ranks[rank], number)

    def signal_torchrun(self, number: signal.Signals) -> None:
        assert self._torchrun is not None
        self._torchrun.send_signal(number)

    def kill(self) -> None:
        """torchrun and all ranks, at once."""
        ranks = self.ranks
        for pid in [*self._seen, *ranks.values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_end(self) -> None:
        """Until no process of this start is left; nobody helps."""
        for _ in until("the run ends", lambda: not self.alive and not self._left()):
            _ = self.ranks
        assert self._torchrun is not None
        self._torchrun.wait()

    def _left(self) -> list[int]:
        """Processes of this start that are there; those that nobody has reaped are not."""
        left = []
        for pid in self._seen:
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if state != "Z" and b"pretrain.py" in command:
                    left.append(pid)
        return left

    def wait_for_step(self, step: int) -> None:
        """Until a step is logged, or the run has ended."""
        for _ in until(f"step {step} is logged", lambda: self.step >= step or self.done):
            assert self.alive or self.done, self.output[-3000:]

    def wait_for_output(self, text: str) -> None:
        for _ in until(f"{text!r} is said", lambda: text in self.output):
            pass

    def check_checkpoints(self) -> int:
        """The step of the newest whole checkpoint, which never falls."""
        steps = sorted(
            (step_of(path) or 0, path) for path in (self.run_dir / "checkpoints").glob("step_*")
        )
        newest = 0
        for step, path in reversed(steps):
            with contextlib.suppress(CheckpointError):
                verify(path)
                newest = step
                break
        assert newest >= self.newest, f"step {self.newest} was saved, now it is {newest}: {steps}"
        self.newest = newest
        return newest


def until(what: str, holds: object, *, limit_s: float = PATIENCE_S) -> Iterator[None]:
    """Yield again and again until `holds()`; an error after `limit_s`."""
    assert callable(holds)
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {limit_s} s until {what}"
        yield
        time.sleep(0.005)
