"""The benchmark of long rows: what it plans, and how it goes on when a case fails."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fulmen.models.config import ModelConfig
from fulmen.trainer.planner import GPUS

pytestmark = pytest.mark.fast

# Only while it is imported, as in test_kernel_cases.py.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import long_steps  # noqa: E402
import train_step  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def options_of(folder: Path, **changes: Any) -> Any:
    return OmegaConf.merge(long_steps.DEFAULTS, {"output": str(folder)}, changes)


def test_a_million_tokens_have_a_way_on_both_chips(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    h200 = long_steps.plan_case("hybrid", 2**20, options, GPUS["h200"])
    assert long_steps.name_of(h200[0]["keys"]) == "full + chunks"
    (h100,) = long_steps.plan_case("hybrid", 2**20, options, GPUS["h100"])
    assert long_steps.name_of(h100["keys"]) == "full + chunks + host"
    assert h100["predicted_host_gib"] == 48
    control = long_steps.plan_case("control", 2**20, options, GPUS["h200"])
    assert control[0]["predicted_step_time_s"] > 5 * h200[0]["predicted_step_time_s"]
    assert long_steps.plan_case("control", 2**20, options, GPUS["h100"]) == []


def test_leaner_ways_are_tried_when_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []

    def run_case(case: dict[str, Any], options: Any, limit_s: float) -> dict[str, Any]:
        tried.append(case)
        if len(tried) < 3:
            return {"failed_in": "head", "error": "CUDA out of memory"}
        if len(tried) == 3:
            return {"failed_in": "forward pass", "error": "no plan of cuDNN"}
        return {"step_time_s": 1.5, "tokens_per_s_per_rank": 7, "mfu": 0.25, "peak_memory_gib": 9}

    monkeypatch.setattr(long_steps, "run_case", run_case)
    options = options_of(tmp_path, kinds=["hybrid"], lengths=[131072, 2**20], budget_s=120)
    rows = long_steps.run_all(options, GPUS["h200"])
    memory = [case["predicted_memory_gib"] for case in tried[:3]]
    assert memory == sorted(memory, reverse=True)
    assert tried[3]["keys"] == tried[2]["keys"] | {"attention": "sdpa"}
    assert [("step_time_s" in row, row["length"]) for row in rows] == [
        (False, 131072),
        (False, 131072),
        (True, 131072),
        (True, 2**20),
    ]
    assert [json.loads(line) for line in (tmp_path / "steps.jsonl").open()] == rows
    lines = (tmp_path / "steps.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert "sdpa | 1.500" in lines[4]
    long_steps.plot(rows, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_what_takes_too_long_is_left_out(tmp_path: Path) -> None:
    options = options_of(tmp_path, kinds=["control"], lengths=[2**20], budget_s=100)
    (row,) = long_steps.run_all(options, GPUS["h200"])
    assert row["error"].startswith("about ")
    assert "are left" in row["error"]


MEASURED = BENCHMARKS / "results/long_steps_h200.jsonl"


@pytest.mark.parametrize(
    "row", [json.loads(line) for line in MEASURED.read_text().splitlines()], ids=str
)
def test_predictions_of_measured_steps(row: dict[str, Any]) -> None:
    """Peak memory within 5 %; time within 10 % on one GPU, where cp keeps the host no busier."""
    model = OmegaConf.load(BENCHMARKS.parent / "recipes/model/text01_1b.yaml")
    config = ModelConfig(**(OmegaConf.to_container(model) | row["shape"]))
    step = {key: row[key] for key in row.keys() & OmegaConf.create(train_step.DEFAULTS).keys()}
    said = train_step.predict(
        config, OmegaConf.merge(long_steps.STEP, step), row["ranks"], GPUS["h200"]
    )
    assert said["predicted_memory_gib"] == pytest.approx(row["peak_memory_gib"], rel=0.05)
    if row["ranks"] == 1:
        assert said["predicted_step_time_s"] == pytest.approx(row["step_time_s"], rel=0.1)
