"""Runs through all stages: stopped within each, gone on with on other meshes, and what is kept."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.staged import SAVE_EVERY, staged_config, write_sources
from support.tiny import read_checkpoint
from support.worlds import run_world

from fulmen.models.text import TextModel
from fulmen.parallel.mesh import release_groups
from fulmen.trainer import run as run_module
from fulmen.trainer.checkpoint import STATE_FILE
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.run import run
from fulmen.trainer.run_config import load_run_config

pytestmark = pytest.mark.slow

FIRST_STEPS = {"start": 1, "to_64": 8, "to_128": 14, "to_256": 18}
"""Of each stage; the run's last step is 21."""
LAST_STEP = 21
WITHOUT_TIME = ("step", "tokens", "stage", "seq_len", "loss", "aux_loss", "grad_norm", "lr")
Job = tuple[RunConfig, int | None]


def run_and_look(device: torch.device, config: RunConfig) -> list[tuple[int, int]]:
    """Models alive and process groups after what each stage but the last gave back."""
    give_back, seen = run_module.give_back, []

    def look(device: torch.device) -> None:
        assert torch.compile(torch.square, backend="eager")(torch.ones(2)).sum() == 2
        assert torch._dynamo.eval_frame.cached_backends
        give_back(device)
        assert not torch._dynamo.eval_frame.cached_backends  # they hold a compiled stage's weights
        alive = sum(type(thing) is TextModel for thing in gc.get_objects())
        seen.append((alive, len(dist.distributed_c10d._world.pg_map)))

    run_module.give_back = look
    run(config, device, "staged")
    return seen


def run_jobs(device: torch.device, jobs: list[Job]) -> None:
    """Run configurations one after the other, each to a step, as if it were killed soon after.

    What a job has saved at its last step is taken away, so that the next one does some of its steps
    again.
    """
    for config, stop in jobs:
        config.trainer.max_steps = stop
        run_dir = run(config, device, "staged")
        release_groups()
        if stop is not None and dist.get_rank() == 0:
            (run_dir / "DONE").unlink()
            if stop % SAVE_EVERY:
                shutil.rmtree(run_dir / "checkpoints" / f"step_{stop}")
        dist.barrier()


def at(root: Path, run_id: str) -> RunConfig:
    config = staged_config(root / "data")
    config.run_root, config.run_id = str(root), run_id
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the run `whole`, to which nothing happened, and `stopped`, within each stage."""
    root = tmp_path_factory.mktemp("staged")
    write_sources(root / "data")
    whole = at(root, "whole")
    whole.checkpoint.resume = "never"  # of its start, not of its stages'
    assert run_world(run_and_look, 2, whole) == [[(0, 1)] * 3] * 2
    stops = [(at(root, "stopped"), stop) for stop in (5, 11, 16, 20, None)]
    run_world(run_jobs, 2, stops)
    return root


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What does not depend on time, accounts and held-out losses included."""
    return [
        {
            key: value
            for key, value in row.items()
            if key in (*WITHOUT_TIME, "batch_digest") or key.startswith(("tokens/", "eval_loss/"))
        }
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Equal rows, to 1e-5 what is computed and exactly what is counted."""
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            computed = isinstance(value, float)
            assert row[key] == (pytest.approx(value, rel=1e-5) if computed else value), (key, row)


def test_every_stage_holds_from_its_first_step(root: Path) -> None:
    steps = [row for row in rows(root / "staged" / "whole") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, LAST_STEP + 1))
    firsts = dict.fromkeys(FIRST_STEPS, 0)
    for row in reversed(steps):
        firsts[row["stage"]] = row["step"]
    assert firsts == FIRST_STEPS
    of_first = {row["stage"]: row for row in steps if row["step"] in FIRST_STEPS.values()}
    assert [row["seq_len"] for row in of_first.values()] == [32, 64, 128, 256]
    # Each warms up anew: over four steps of the run's own schedule, or two to half the rate.
    peak = 3e-3
    assert [row["lr"] for row in of_first.values()] == pytest.approx([peak / 4] * 4)
    lasts = [steps[first - 2] for first in list(FIRST_STEPS.values())[1:]]
    assert [row["lr"] for row in lasts] == pytest.approx([peak, peak / 2, peak / 2])
    for row in steps:
        account = {key: value for key, value in row.items() if key.startswith("tokens/")}
        assert len(account) == 6
        assert sum(account.values()) == row["tokens"]
    assert steps[FIRST_STEPS["to_64"] - 2]["tokens/qa/short"] == 0
    assert steps[-1]["tokens/qa/short"] > 0


def test_the_model_of_a_stage_is_saved_with_its_checkpoint(root: Path) -> None:
    checkpoints = root / "staged" / "whole" / "checkpoints"
    bases = [
        load_run_config(checkpoints / f"step_{step}").model.rope_theta for step in (7, 13, 17, 21)
    ]
    assert bases == [1e4, 5e4, 1e5, 1e5]
    # keep=2 takes its turn among the others alone.
    kept = {path.name for path in checkpoints.glob("step_*")}
    assert kept == {"step_7", "step_13", "step_17", "step_21", "step_15", "step_18"}


def test_a_run_stopped_within_each_stage_equals_the_undisturbed(root: Path) -> None:
    whole, stopped = root / "staged" / "whole", root / "staged" / "stopped"
    assert rows(stopped) == rows(whole)
    log = (stopped / "train.log").read_text()
    for step in (3, 9, 15, 18):
        assert f"resumed at step {step}," in log
    ours, theirs = (folder / "checkpoints" / f"step_{LAST_STEP}" for folder in (stopped, whole))
    states = [json.loads((folder / STATE_FILE).read_text()) for folder in (ours, theirs)]
    assert states[0] == states[1]
    assert states[0]["stage"] == {"name": "to_256", "first_step": 17, "ended": True}
    tensors, expected = read_checkpoint(ours), read_checkpoint(theirs)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def from_step(root: Path, run_id: str, step: int) -> Path:
    """A copy of the undisturbed run as it was at a checkpoint."""
    run_dir = root / "staged" / run_id
    shutil.copytree(root / "staged" / "whole", run_dir, symlinks=True)
    (run_dir / "DONE").unlink()
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return run_dir


def test_a_job_ends_before_a_stage_that_needs_other_processes(root: Path) -> None:
    run_dir = from_step(root, "alone", FIRST_STEPS["to_64"] - 1)
    run_world(run_jobs, 1, [(at(root, "alone"), None)])
    log = (run_dir / "train.log").read_text()
    assert "the job ends before stage to_128, which needs other processes: stages.to_128: " in log
    assert not (run_dir / "DONE").exists()
    ours, theirs = rows(run_dir), rows(root / "staged" / "whole")
    assert ours[-1]["step"] == FIRST_STEPS["to_128"] - 1
    assert_close(ours, theirs[: len(ours)])


def test_a_run_goes_on_over_a_stage_on_another_mesh(root: Path) -> None:
    run_dir = from_step(root, "moved", 15)  # within to_128
    config = at(root, "moved")
    config.stages["to_128"].parallel = {"cp": 4, "zero_stage": 2}
    config.stages["to_256"].parallel = {"cp": 2, "ep": 4, "zero_stage": 3}
    run_world(run_jobs, 4, [(config, None)])
    assert (run_dir / "DONE").exists()
    assert_close(rows(run_dir), rows(root / "staged" / "whole"))


def run_until_asked(device: torch.device, config: RunConfig, step: int) -> None:
    train_step = Trainer.train_step

    def asked(trainer: Trainer, batch: Any) -> Any:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, batch)

    Trainer.train_step = asked  # type: ignore[method-assign]
    run(config, device, "staged")


def test_a_stop_in_the_last_step_of_a_stage_is_heard(root: Path) -> None:
    config = at(root, "asked")
    last = FIRST_STEPS["to_128"] - 1
    run_world(run_until_asked, 1, config, last)
    run_dir = root / "staged" / "asked"
    assert rows(run_dir)[-1]["step"] == last
    assert not (run_dir / "DONE").exists()
    assert "asked to stop by SIGTERM" in (run_dir / "train.log").read_text()


def test_the_first_stage_of_a_job_must_be_possible(root: Path) -> None:
    from_step(root, "late", FIRST_STEPS["to_256"] - 1)
    with pytest.raises(ValueError, match=r"stages\.to_256: parallel\.cp=2 does not divide the 1"):
        run_world(run_jobs, 1, [(at(root, "late"), None)])
