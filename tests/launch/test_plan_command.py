"""The planner's command: what it prints, and what it says of mistakes."""

import json
import subprocess
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from support import HANG_S, warm
from support.tiny import ROOT, text01_data

from fulmen.launch.plan import PlanConfig, plan
from fulmen.trainer.config import to_dataclass

KEYS = [
    "total_params",
    "active_params",
    "memory_gib_per_rank",
    "flops_per_token",
    "step_time_s",
    "mfu",
    "tokens_per_day",
    "gpu_hours",
    "stages",
]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*warm.shared_python(), str(ROOT / "launch" / "plan.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def configured(*overrides: str) -> PlanConfig:
    ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
    with initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        recipe = next((word for word in overrides if word.startswith("recipe=")), "")
        paths = text01_data() if not recipe else text01_data()[:1]
        words = [*paths, *overrides]
        return to_dataclass(compose("plan", words), PlanConfig)


def as_json(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    plan(configured("format=json", *overrides))
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict)
    return facts


@pytest.mark.slow
def test_text01_on_2048_gpus() -> None:
    done = command("recipe=text01", "gpus=2048", "gpu=h800", "format=json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(KEYS) <= set(facts)
    assert facts["total_params"] == 456_089_655_296
    assert facts["active_params"] == 45_944_920_064
    memory = dict(facts["memory_gib_per_rank"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()), abs=0.01)
    assert facts["fits"]
    assert facts["changes"] == []


@pytest.mark.slow
def test_mistakes_are_told_in_one_line() -> None:
    for words, message in [
        (["gpus=2048", "gpu=h800", "parallel.ep=7"], "parallel.ep=7 x parallel.etp=1 does not"),
        (["gpus=2048", "network_gb_per=5"], "did you mean network_gb_per_s"),
    ]:
        done = command("recipe=text01", *words)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=0"], "gpus=0"),
        (["gpus=2048", "gpu=tpu"], "gpu=tpu: must be one of h100"),
        (["gpus=2048", "format=xml"], "format=xml"),
        (["gpus=2048", "memory_share=0"], "memory_share=0"),
        (["gpus=3000"], "does not divide"),
    ],
)
def test_bad_values(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(configured(*words))


def test_text_says_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    plan(configured("gpus=2048", "gpu=h800"))
    said = capsys.readouterr().out
    assert "it fits: " in said
    assert "456,089,655,296" in said
    assert "network_gb_per_s=50" in said
    plan(configured("gpus=2048", "gpu=h800", "parallel.ep=1", "parallel.zero_stage=1"))
    said = capsys.readouterr().out
    assert "pretrain: it does not fit; it would with stages.pretrain.parallel." in said
    plan(configured("recipe=text01_3b", "gpu=a100", "trainer.micro_batch_tokens=524288"))
    assert "it does not fit; it would with trainer.micro_batch" in capsys.readouterr().out
    few = ["stages.to_128k.parallel.cp=1", "stages.to_512k.parallel.cp=1"]
    plan(configured("gpus=32", "gpu=h800", *few, "~stages.to_1m"))
    assert "take more GPUs" in capsys.readouterr().out


def test_every_stage_of_text01_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, "gpus=2048", "gpu=h800")
    stages = facts["stages"]
    assert [stage["name"] for stage in stages] == ["pretrain", "to_128k", "to_512k", "to_1m"]
    assert [stage["seq_len"] for stage in stages] == [2**13, 2**17, 2**19, 2**20]
    assert [round(stage["tokens"] / 1e9) for stage in stages] == [11_400, 300, 32, 26]
    for stage in stages:
        memory = dict(stage["memory_gib_per_rank"])
        assert memory.pop("total") == pytest.approx(sum(memory.values()), abs=0.01)
        assert stage["fits"]
        assert stage["mfu"] > 0.1
        spent = sum(row["steps"] * row["step_time_s"] for row in stage["batches"])
        assert stage["gpu_hours"] == pytest.approx(2048 * spent / 3600, rel=1e-2)
    # The attention of a longer row costs more, and nothing else does.
    assert stages[3]["flops_per_token"] > stages[2]["flops_per_token"]
    work = [stage["step_work_s"] for stage in stages]
    assert work[3]["experts"] == work[2]["experts"]
    assert work[3]["softmax core"] == pytest.approx(2 * work[2]["softmax core"])
    assert facts["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in stages))
    assert facts["days"] == pytest.approx(sum(stage["days"] for stage in stages))


def test_a_stage_that_the_gpus_cannot_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"stages\.to_1m: parallel\.cp=48 does not divide"):
        plan(configured("gpus=2048", "gpu=h800", "stages.to_1m.parallel.cp=48"))


def test_the_network_counts(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = (
        as_json(capsys, "gpus=2048", "gpu=h800", f"network_gb_per_s={rate}")["step_time_s"]
        for rate in (25, 100)
    )
    assert slow > fast


def test_a_step_limit_ends_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, "gpus=2048", "gpu=h800", "trainer.max_steps=5000")
    rows = facts["stages"][0]["batches"]
    assert sum(row["steps"] for row in rows) == 5000
    assert len(rows) == 2
    spent = sum(row["steps"] * row["step_time_s"] for row in rows)
    assert facts["gpu_hours"] == pytest.approx(2048 * spent / 3600, rel=1e-3)


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=text01_1b", "gpus=4", "search=true"]
    found = as_json(capsys, *words)["stages"][0]["search"]
    assert 1 <= len(found) <= 5
    assert found[0]["step_time_s"] <= found[-1]["step_time_s"]
    plan(configured(*words))
    assert "etp" in capsys.readouterr().out
