"""A run that is asked to stop ends at one step on all ranks, saved, and goes on from there."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_config
from support.worlds import run_world

from fulmen.parallel.mesh import build_mesh
from fulmen.trainer import run_folder, stop
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.run import run
from fulmen.trainer.run_folder import DONE
from fulmen.trainer.stop import STOP

pytestmark = pytest.mark.slow

STEPS = 6


def config_in(data: Path, root: Path, run_id: str) -> RunConfig:
    config = tiny_config(data, max_steps=STEPS)
    config.run_root, config.run_id = str(root), run_id
    config.evaluation.every_steps = None
    return config


def stop_and_go_on(device: torch.device, data: Path, root: Path) -> dict[str, Any]:
    """One world: a run in peace, and one that is stopped in each way and goes on each time."""
    peace = run(config_in(data, root, "peace"), device, "tiny")
    config = config_in(data, root, "stopped")
    ends = []

    def ask_at(step: int, way: str) -> None:
        mesh = build_mesh(config.parallel, device)
        trainer = Trainer(config, mesh, root / "tiny" / "stopped")
        inner = trainer.train_step

        def train_step(batch: Any) -> Any:
            result = inner(batch)
            if trainer.step + 1 == step:  # all ranks are in it by now
                if way == "file" and dist.get_rank() == 1:
                    (root / "tiny" / "stopped" / STOP).touch()
                if way == "signal" and dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return result

        trainer.train_step = train_step  # type: ignore[method-assign]
        trainer.fit()
        trainer.close()
        ends.append(trainer.step)

    (root / "tiny" / "stopped").mkdir(parents=True, exist_ok=True)
    handler = signal.getsignal(signal.SIGTERM)
    ask_at(1, "file")
    dist.barrier()
    (root / "tiny" / "stopped" / STOP).unlink(missing_ok=True)
    dist.barrier()
    ask_at(4, "signal")
    assert signal.getsignal(signal.SIGTERM) is handler
    stopped = run(config, device, "tiny")
    return {
        "ends": ends,
        "peace": peace,
        "stopped": stopped,
    }


def interrupt(device: torch.device, run_dir: Path) -> tuple[bool, bool]:
    """Whether a run stops for one Ctrl-C, and what a second one does."""
    listener = stop.Stop(run_dir, 60.0)
    try:
        listener.poll()
        assert not listener.agreed()
        for _ in range(2):  # by the terminal and by torchrun
            os.kill(os.getpid(), signal.SIGINT)
        asked = listener.asked_since()
        stop._ONCE_S = 0.0
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return asked, True
        return asked, False
    finally:
        listener.close()


def test_ctrl_c_asks_and_once_more_ends(tmp_path: Path) -> None:
    assert run_world(interrupt, 1, tmp_path) == [(True, True)]


def meet(device: torch.device, run_dir: Path) -> list[str]:
    """What is told to a job that comes to a folder in use, and to one that comes later."""
    told = []
    run_folder.HERE_S = 0.0
    for _ in range(2):
        with run_folder.alone_in(run_dir, 60.0):
            try:
                with run_folder.alone_in(run_dir, 60.0):
                    told.append("")
            except ValueError as error:
                told.append(str(error))
    return told


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = run_world(meet, 2, tmp_path)
    assert first == second
    for said in first:
        assert said.startswith(f"{tmp_path} is in use, by {socket.gethostname()}, process ")
        assert f"remove {tmp_path}/.lock" in said


def test_a_job_started_anew_elsewhere_does_not_wait_for_a_lost_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "ELSEWHERE_S", 0.0)
    path = tmp_path / "lock"
    path.write_text("lost, process 7 of job 33")
    with path.open() as held, path.open("r+") as file:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setenv("SLURM_JOB_ID", "33")
        assert run_folder._take(file.fileno(), tmp_path, 60.0) is None
        monkeypatch.setenv("SLURM_JOB_ID", "3")
        said = run_folder._take(file.fileno(), tmp_path, 60.0)
        assert said is not None
        assert "in use, by lost, process 7 of job 33: two jobs" in said


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "file").open("w") as file:
        assert run_folder._take(file.fileno(), tmp_path, 60.0) is None


def test_a_run_that_is_asked_stops_at_one_step_and_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    first, second = run_world(stop_and_go_on, 2, tiny_data, tmp_path)
    # Asked within step 1 and within step 4: all see it before the next one.
    assert first["ends"] == second["ends"] == [2, 5]
    rows = [read_metrics(first[name] / "metrics.jsonl") for name in ("peace", "stopped")]
    kept = ("step", "loss", "grad_norm", "batch_digest")
    expected, found = ([{key: row[key] for key in kept} for row in some] for some in rows)
    assert found == expected
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert (first["stopped"] / DONE).exists()
