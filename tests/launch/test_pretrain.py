"""The entry point as it is used: processes that are killed and started again, and its errors."""

import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import HANG_S, warm
from support.processes import SCRIPT, finish, kill_at, start
from support.tiny import ROOT, as_overrides, compose_config, read_checkpoint, tiny_config
from support.worlds import run_world

from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.run import run

pytestmark = pytest.mark.slow

STEPS = 10
SAVE_EVERY = 2
SAME = ("step", "tokens", "loss", "aux_loss", "grad_norm", "lr", "batch_digest", "drop_rate")


def overrides(data: Path, run_root: Path, run_id: str, *, stage: int) -> list[str]:
    config = tiny_config(data, max_steps=STEPS)
    config.parallel = ParallelConfig(zero_stage=stage)
    config.checkpoint.every_steps = SAVE_EVERY
    config.evaluation.every_steps = 5
    return [*as_overrides(config), f"run_root={run_root}", f"run_id={run_id}"]


def run_here(device: torch.device, runs: list[list[str]]) -> None:
    """Several runs, one after the other, in the processes of one world."""
    for arguments in runs:
        config = compose_config(arguments)
        run(config, device, "text01_tiny")


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs `<processes>-<stage>` that nothing happened to; read only."""
    root = tmp_path_factory.mktemp("undisturbed")
    for size, stages in [(1, [1]), (2, [0, 1, 2, 3])]:
        runs = [overrides(tiny_data, root, f"{size}-{stage}", stage=stage) for stage in stages]
        run_world(run_here, size, runs)
    return root / "text01_tiny"


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The steps' rows without what depends on time, and the evaluations'."""
    read = read_metrics(run_dir / "metrics.jsonl")
    evaluations = ("eval_loss/text",)
    return [{key: row[key] for key in (*SAME, *evaluations) if key in row} for row in read]


@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    size: int, stage: int, undisturbed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    arguments = overrides(tiny_data, tmp_path, "killed", stage=stage)
    run_dir = tmp_path / "text01_tiny" / "killed"
    # Late enough for a whole checkpoint, because a save waits for the one before it.
    step = random.randint(2 * SAVE_EVERY + 1, STEPS - 3)
    kill_at(start(size, arguments, tmp_path), step, run_dir / "metrics.jsonl")
    assert not (run_dir / "DONE").exists()
    finish(start(size, arguments, tmp_path), tmp_path)
    assert (run_dir / "DONE").exists()
    assert "resumed at step" in (run_dir / "train.log").read_text()

    whole = undisturbed / f"{size}-{stage}"
    expected, found = rows(whole), rows(run_dir)
    assert [row["step"] for row in expected if "loss" in row] == list(range(1, STEPS + 1))
    assert found == expected, f"killed at step {step}"
    ours = read_checkpoint(run_dir / "checkpoints" / f"step_{STEPS}")
    theirs = read_checkpoint(whole / "checkpoints" / f"step_{STEPS}")
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "exp_avg", "exp_avg_sq", "rng"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name}, killed at step {step}"


def test_losses_fall(undisturbed: Path) -> None:
    # The comparisons above would also hold for a run that learns nothing.
    losses = [row["loss"] for row in rows(undisturbed / "2-1") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1


def test_the_mesh_is_told(undisturbed: Path) -> None:
    log = (undisturbed / "2-1" / "train.log").read_text()
    assert "2 rank(s) = dp x cp = edp x ep x etp" in log
    assert "edp     2  the same experts" in log


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            exact = key in ("step", "tokens", "batch_digest")
            assert row[key] == (value if exact else pytest.approx(value, rel=1e-5)), (key, row)


def test_stages_and_worlds_agree(undisturbed: Path) -> None:
    for name in ("2-0", "2-1", "2-2", "2-3"):
        close(rows(undisturbed / name), rows(undisturbed / "1-1"))


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (4, 3)])
def test_a_run_goes_on_with_other_processes_and_another_stage(
    size: int, stage: int, undisturbed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "text01_tiny" / "moved"
    shutil.copytree(undisturbed / "2-2", run_dir, symlinks=True)
    (run_dir / "DONE").unlink()
    for step in (STEPS, STEPS - SAVE_EVERY):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step}")
    run_world(run_here, size, [overrides(tiny_data, tmp_path, "moved", stage=stage)])
    log = (run_dir / "train.log").read_text()
    assert f"resumed at step {STEPS - 2 * SAVE_EVERY}" in log
    assert (run_dir / "DONE").exists()
    close(rows(run_dir), rows(undisturbed / "2-2"))


def test_a_run_that_is_killed_goes_on_on_fewer_and_on_more_processes(
    undisturbed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    # The same global batch: two micro-batches a step on each of 2 processes, one on each of 4.
    arguments = overrides(tiny_data, tmp_path, "elastic", stage=1)
    run_dir = tmp_path / "text01_tiny" / "elastic"
    for size, step in ((4, SAVE_EVERY + 2), (2, 3 * SAVE_EVERY + 1)):
        kill_at(start(size, arguments, tmp_path), step, run_dir / "metrics.jsonl")
    finish(start(4, arguments, tmp_path), tmp_path)
    log = (run_dir / "train.log").read_text()
    assert log.count("resumed at step") == 2
    assert [f"{size} rank(s) =" in log for size in (2, 4)] == [True, True]
    close(rows(run_dir), rows(undisturbed / "2-1"))
    ours, theirs = (
        [
            {key: row[key] for key in row if key.startswith("tokens/")}
            for row in read_metrics(path / "metrics.jsonl")
            if "loss" in row
        ]
        for path in (run_dir, undisturbed / "2-1")
    )
    assert ours == theirs
    assert len(ours) == STEPS
    assert ours[-1]


# ---- errors ----


def fail(*arguments: str, command: Sequence[str] = (sys.executable,)) -> str:
    """Run the entry point in a way that cannot work; what it said.

    Ten seconds are promised: of processor time, which does not depend on what else runs here.
    """
    result = subprocess.run(
        [*command, SCRIPT, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (10, 10)),
    )
    assert result.returncode > 0, f"ended by signal {-result.returncode}"
    return result.stderr


def error_of(*arguments: str, command: Sequence[str] = (sys.executable,)) -> str:
    """The one message of a run that cannot work, what is logged before it left out."""
    said = fail(*arguments, command=command)
    assert "Traceback" not in said
    lines = [line for line in said.strip().splitlines() if " INFO " not in line]
    assert lines[0].startswith("error: "), said
    assert not any(line.startswith("error") for line in lines[1:]), said
    return "\n".join(lines)


def test_a_misspelt_key_under_torchrun() -> None:
    torchrun = [*warm.shared_python(), "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    said = fail("recipe=text01_tiny", "model.hidden_sise=64", command=torchrun)
    assert "unknown key model.hidden_sise; did you mean model.hidden_size" in said


@pytest.fixture
def valid(tiny_data: Path, tmp_path: Path) -> list[str]:
    return overrides(tiny_data, tmp_path, "fails", stage=1)


def test_a_misspelt_key() -> None:
    said = error_of("optim.weight_dacay=0")
    assert said.startswith("error: unknown key optim.weight_dacay; did you mean optim.weight_decay")


def test_a_value_of_the_wrong_type() -> None:
    said = error_of("model.hidden_size=wide")
    assert "hidden_size" in said
    assert "wide" in said


def test_an_unknown_recipe() -> None:
    said = error_of("recipe=text02")
    assert "recipe/text02" in said
    assert "text01_tiny" in said


def test_a_key_without_a_value() -> None:
    assert "no value for data.sources.corpus.path" in error_of("recipe=text01")


def test_a_batch_that_does_not_divide(valid: list[str]) -> None:
    said = error_of(*valid, "data.global_batch_tokens=300")
    assert "data.global_batch_tokens=300 is not a multiple of trainer.micro_batch_tokens=64" in said


def test_a_missing_data_folder(valid: list[str], tmp_path: Path) -> None:
    said = error_of(*valid, f"data.sources.text.path={tmp_path}/nowhere")
    assert f"data.sources.text.path: data folder {tmp_path}/nowhere does not exist" in said


def test_a_missing_tokenizer(valid: list[str], tiny_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    (folder / "tokenizer.json").unlink()
    said = error_of(*valid, f"data.sources.text.path={folder}", command=warm.shared_python())
    assert f"data.sources.text: {folder}/tokenizer.json is missing" in said


def test_an_unwritable_run_folder(valid: list[str], tmp_path: Path) -> None:
    # Nobody can write below a file, not even root.
    (tmp_path / "file").touch()
    said = error_of(*valid, f"run_root={tmp_path}/file", command=warm.shared_python())
    assert f"run folder {tmp_path}/file/text01_tiny/fails cannot be written" in said
    assert "run_root" in said
