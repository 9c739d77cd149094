"""The recipe text01_tiny_1m on real text: killed in each stage, and moved to other meshes.

Its stages are cut to ten steps each. Needs what `make data questions` makes; `make test-stages`.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.processes import finish, kill_at, start
from support.tiny import ROOT, read_checkpoint

from fulmen.trainer.metrics import read_metrics

pytestmark = pytest.mark.stages

STAGES = ("pretrain", "to_128k", "to_512k", "to_1m")
STEPS = 10
"""Of each stage."""
TIMEOUT_S = 900
TIMES = (
    *("step_time_s", "data_wait_s", "checkpoint_stall_s", "tokens_per_s"),
    *("tflops_per_device", "memory_gib"),
)


def words(root: Path, run_id: str) -> list[str]:
    # Rows are never quite full, so ten steps have fewer tokens than these, and nine more.
    tokens = [f"stages.{name}.tokens={STEPS * 4096 - 3000}" for name in STAGES]
    shorter = [f"stages.{name}.transition_tokens=8000" for name in STAGES[1:]]
    more = ["checkpoint.every_steps=3", "evaluation.every_steps=10", "evaluation.max_tokens=8000"]
    return [
        "recipe=text01_tiny_1m",
        f"run_root={root}",
        f"run_id={run_id}",
        *tokens,
        *shorter,
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("stdlib", "retrieval"):
        assert (ROOT / "data_cache" / name / "manifest.json").exists(), "make data questions"
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start(2, words(root, "whole"), root), root, timeout_s=TIMEOUT_S)
    return root / "text01_tiny_1m" / "whole"


def rows(run_dir: Path) -> list[dict[str, Any]]:
    read = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read]


def first_steps(run_dir: Path) -> list[int]:
    firsts: dict[str, int] = {}
    for row in rows(run_dir):
        if "stage" in row:
            firsts.setdefault(row["stage"], row["step"])
    assert tuple(firsts) == STAGES
    return list(firsts.values())


def test_killed_in_each_stage(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "text01_tiny_1m" / "killed"
    for first in first_steps(undisturbed):
        ranks = start(2, words(tmp_path, "killed"), tmp_path)
        kill_at(ranks, first + 7, run_dir / "metrics.jsonl", timeout_s=TIMEOUT_S)
        assert not (run_dir / "DONE").exists()
    finish(start(2, words(tmp_path, "killed"), tmp_path), tmp_path, timeout_s=TIMEOUT_S)
    assert rows(run_dir) == rows(undisturbed)
    last = f"checkpoints/step_{rows(undisturbed)[-1]['step']}"
    ours, theirs = read_checkpoint(run_dir / last), read_checkpoint(undisturbed / last)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_moved_to_other_meshes_within_and_across_stages(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "text01_tiny_1m" / "moved"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    (run_dir / "DONE").unlink()
    begin = first_steps(undisturbed)[1] - 1  # the end of the first stage is always kept
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > begin:
            shutil.rmtree(path)
    # One process to the end of the second stage, four from within the third over its end.
    finish(start(1, words(tmp_path, "moved"), tmp_path), tmp_path, timeout_s=TIMEOUT_S)
    assert "the job ends before stage to_512k" in (run_dir / "train.log").read_text()
    middle = first_steps(undisturbed)[2] + 5
    ranks = start(2, words(tmp_path, "moved"), tmp_path)
    kill_at(ranks, middle, run_dir / "metrics.jsonl", timeout_s=TIMEOUT_S)
    mesh = ["stages.to_512k.parallel.cp=4", "stages.to_512k.parallel.ep=2"]
    mesh += ["stages.to_512k.parallel.zero_stage=3", "stages.to_1m.parallel.ep=4"]
    finish(start(4, [*words(tmp_path, "moved"), *mesh], tmp_path), tmp_path, timeout_s=TIMEOUT_S)
    ours, theirs = rows(run_dir), rows(undisturbed)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            # A token near a tie may go to another expert.
            rough = {"aux_loss": 1e-3, "expert_imbalance": 1e-2}
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=rough.get(key, 1e-5)), (key, row)
            else:
                assert row[key] == value, (key, row)
