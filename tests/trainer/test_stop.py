"""A run that is asked to stop ends at one step on all ranks, saved, and goes on from there."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_config
from support.worlds import run_world

from fulmen.parallel.mesh import build_mesh
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
