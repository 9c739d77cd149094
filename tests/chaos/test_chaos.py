"""One run under twenty random faults ends with the weights of the run that nothing happened to.

Only with `make test-chaos`. `FULMEN_CHAOS_SEED` chooses other faults at other steps; the seed and
the faults are printed.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Disk, Job, until
from support.tiny import as_overrides, read_checkpoint, tiny_config

from fulmen.trainer.metrics import read_metrics

pytestmark = pytest.mark.chaos

STEPS, SAVE_EVERY = 420, 5
TIMEOUT_S = 8
"""Of a collective; what stands still for longer than this and 10 s more ends itself."""
SAME = ("step", "tokens", "loss", "aux_loss", "grad_norm", "lr", "batch_digest", "eval_loss/text")
FAULTS = {
    "kill a rank": 3,
    "kill torchrun": 2,
    "kill all": 3,
    "kill all within a save": 3,
    "stop a rank for a moment": 2,
    "stop a rank": 1,  # torchrun kills what does not end by SIGTERM, after 30 s
    "ask to end": 2,
    "fill the disk": 2,
    "freeze the disk for a moment": 1,
    "freeze the disk": 1,
}


class Faults:
    """What is done to a run; each returns when it is over, and says whether the run has ended."""

    def __init__(self, job: Job, disk: Disk, chance: random.Random) -> None:
        self._job, self._disk, self._chance = job, disk, chance

    def do(self, name: str) -> None:
        faults: dict[str, Callable[[], None]] = {
            "kill a rank": self.kill_rank,
            "kill torchrun": self.kill_torchrun,
            "kill all": self.kill_all,
            "kill all within a save": self.kill_within_save,
            "stop a rank for a moment": self.stop_for_a_moment,
            "stop a rank": self.stop,
            "ask to end": self.ask_to_end,
            "fill the disk": self.fill_disk,
            "freeze the disk for a moment": self.freeze_for_a_moment,
            "freeze the disk": self.freeze,
        }
        faults[name]()

    def kill_rank(self) -> None:
        rank = self._chance.randrange(2)
        self._job.signal_rank(rank, signal.SIGKILL)
        self._job.wait_for_end()
        assert f"missing: rank {rank}" in self._job.output

    def kill_torchrun(self) -> None:
        assert len(self._job.ranks) == 2
        self._job.signal_torchrun(signal.SIGKILL)
        self._job.wait_for_end()
        assert "torchrun, which watches over it, has ended" in self._job.output

    def kill_all(self) -> None:
        self._job.kill()
        self._job.wait_for_end()

    def kill_within_save(self) -> None:
        folder = self._job.run_dir / "checkpoints"
        for _ in until("a save", lambda: list(folder.glob(".step_*.writing"))):
            pass
        time.sleep(self._chance.random() * 0.02)
        self.kill_all()

    def stop_for_a_moment(self) -> None:
        rank = self._chance.randrange(2)
        self._job.signal_rank(rank, signal.SIGSTOP)
        time.sleep(2)
        self._job.signal_rank(rank, signal.SIGCONT)

    def stop(self) -> None:
        rank = self._chance.randrange(2)
        self._job.signal_rank(rank, signal.SIGSTOP)
        self._job.wait_for_end()
        assert f"missing: rank {rank}" in self._job.output
        dumps = sorted((self._job.run_dir / "dumps").iterdir())
        assert (dumps[-1] / f"rank{1 - rank}.txt").exists()

    def ask_to_end(self) -> None:
        self._job.signal_torchrun(signal.SIGTERM)
        self._job.wait_for_end()
        assert "asked to stop by" in self._job.output

    def fill_disk(self) -> None:
        before = self._job.output.count("could not be saved")
        self._disk.fill()
        for _ in until(
            "a save fails", lambda: self._job.output.count("could not be saved") > before
        ):
            assert self._job.alive
        newest = self._job.check_checkpoints()
        self._disk.free()
        for _ in until("a save works", lambda: self._job.check_checkpoints() > newest):
            assert self._job.alive or self._job.done

    def freeze_for_a_moment(self) -> None:
        self._disk.freeze()
        time.sleep(3)
        self._disk.thaw()

    def freeze(self) -> None:
        self._disk.freeze()
        try:
            self._job.wait_for_output("and ends itself")
            time.sleep(1)
        finally:
            self._disk.thaw()
        self._job.wait_for_end()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("fsfreeze") is None:
        pytest.skip("a disk of its own, which can be full and frozen, needs root and util-linux")
    made = Disk(tmp_path)
    yield made
    made.close()


def arguments(data: Path, run_root: Path) -> list[str]:
    config = tiny_config(data, max_steps=STEPS)
    config.schedule.phases[-1].tokens = 10**7
    config.parallel.timeout_s = TIMEOUT_S
    config.checkpoint.every_steps, config.checkpoint.keep = SAVE_EVERY, 2
    config.checkpoint.max_failures = 1000  # a save is due each moment
    config.evaluation.every_steps = 50
    return [*as_overrides(config), f"run_root={run_root}", "run_id=run"]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    read = read_metrics(run_dir / "metrics.jsonl")
    return [{key: row[key] for key in SAME if key in row} for row in read]


def test_twenty_faults_change_nothing(tiny_data: Path, tmp_path: Path, disk: Disk) -> None:
    seed = int(os.environ.get("FULMEN_CHAOS_SEED", "1"))
    chance = random.Random(seed)
    names = [name for name, count in FAULTS.items() for _ in range(count)]
    assert len(names) == 20
    chance.shuffle(names)
    gap = STEPS // (len(names) + 2)  # the last one comes before the run is over
    steps = [gap * number + chance.randrange(1, gap) for number in range(1, len(names) + 1)]
    print(f"\nFULMEN_CHAOS_SEED={seed}")

    logs = tmp_path / "logs"
    logs.mkdir()
    job = Job(disk.root / "text01_tiny" / "run", arguments(tiny_data, disk.root), logs)
    faults, begun = Faults(job, disk, chance), time.monotonic()
    try:
        for name, step in zip(names, steps, strict=True):
            if not job.alive:
                job.start()
            job.wait_for_step(step)
            assert not job.done, "the run was over before all faults"
            faults.do(name)
            print(
                f"{time.monotonic() - begun:5.0f} s  step {step:4}  {name:30}"
                f" saved: {job.check_checkpoints()}",
                flush=True,
            )
        for _ in range(3):
            if not job.alive and not job.done:
                job.start()
            job.wait_for_end()
    finally:
        job.kill()
    assert job.done, job.output[-3000:]
    disturbed_s = time.monotonic() - begun

    peace = Job(tmp_path / "text01_tiny" / "run", arguments(tiny_data, tmp_path), logs)
    peace.starts = job.starts
    peace.start()
    peace.wait_for_end()
    assert peace.done, peace.output[-3000:]
    whole_s = time.monotonic() - begun
    print(f"{job.starts} starts, {disturbed_s:.0f} s; with the undisturbed run {whole_s:.0f} s")

    assert [row["step"] for row in rows(peace.run_dir) if "loss" in row] == [*range(1, STEPS + 1)]
    assert rows(job.run_dir) == rows(peace.run_dir)
    ours, theirs = (
        read_checkpoint(one.run_dir / "checkpoints" / f"step_{STEPS}") for one in (job, peace)
    )
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "exp_avg", "exp_avg_sq", "rng"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
