"""The kernels' benchmark at toy sizes on the CPU: its truths, its checks, its tables."""

import json
import os
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Only while these are imported: benchmarks/kernels.py must not be what transformers finds when it
# looks for a package of that name.
sys.path.insert(0, str(BENCHMARKS))
from kernel_cases import OPS, cases_of  # noqa: E402
from kernel_cases.case import Case, Provider, Settings  # noqa: E402
from kernel_cases.goals import goals  # noqa: E402
from kernel_cases.measure import Measurement, make_inputs, make_sets, median_ms  # noqa: E402
from kernel_cases.report import markdown, with_baselines, write  # noqa: E402
from kernel_cases.runner import Plan, run_job, run_jobs, truth_of, work  # noqa: E402

from fulmen.kernels import registry  # noqa: E402

command = runpy.run_path(str(BENCHMARKS / "kernels.py"))
sys.path.remove(str(BENCHMARKS))

CPU = torch.device("cpu")
CEILINGS = {"copy_tb_per_s": 1.0, "matmul_tflop_per_s": 1.0}
TOY = Settings(
    lengths=(37,),
    documents=4,
    packed_length=40,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    experts=4,
    inner=48,
    vocabulary=97,
    layers=8,
)
PLAN = Plan(TOY, (), seconds=0.0)
RUNS_ON_CPU = {
    "fulmen torch",
    "fulmen auto",
    "fulmen sdpa",
    "bare grouped_mm",
    "torch rms_norm",
    "torch whole_logits",
}


def measure(case: Case, provider: Provider) -> dict[str, Any]:
    expected = truth_of(case, CPU, torch.float32)
    assert not isinstance(expected, str), expected
    sets = make_sets(case, CPU, torch.float32)
    return Measurement(case, provider, sets, expected, seconds=0.0).run(CEILINGS)


@pytest.mark.parametrize("op", OPS)
def test_references_agree_with_the_truth(op: str) -> None:
    checked = 0
    for case in cases_of(op, TOY):
        expected = truth_of(case, CPU, torch.float32)
        for name in case.providers:
            if name not in RUNS_ON_CPU:
                continue
            row = run_job(case, name, expected, CPU, torch.float32, PLAN, CEILINGS)
            assert row.get("forward_ms"), row
            has_backward = bool(make_inputs(case, CPU, torch.float32).gradients)
            assert ("training_ms" in row) == has_backward, row
            checked += 1
    assert checked
    # What a job asked for, it has taken back.
    chosen = op if op in registry.IMPLEMENTATIONS else "norm"
    best, *_, last = registry.IMPLEMENTATIONS[chosen]
    assert registry.choose(chosen, (best, ""), (last, "")) == best


@pytest.mark.parametrize("op", OPS)
def test_our_kernels_say_why_they_cannot_run_here(op: str) -> None:
    for case in cases_of(op, replace(TOY, rivals=False)):
        expected = truth_of(case, CPU, torch.float32)
        for name in set(case.providers) - RUNS_ON_CPU:
            row = run_job(case, name, expected, CPU, torch.float32, PLAN, CEILINGS)
            assert row["failed"]
            assert "forward_ms" not in row


@pytest.mark.parametrize("op", ["norm", "lightning", "attention", "cross_entropy"])
def test_a_wrong_result_gets_no_figures(op: str) -> None:
    case = cases_of(op, TOY)[0]
    right = case.providers["fulmen auto" if op == "attention" else "fulmen torch"]().call

    def scaled(*arguments: Any) -> torch.Tensor:
        return 1.01 * right(*arguments)

    def without_numbers(*arguments: Any) -> torch.Tensor:
        return right(*arguments) + float("nan")

    def wrong_gradient(*arguments: Any) -> torch.Tensor:
        output = right(*arguments)
        return 1.01 * output - 0.01 * output.detach()

    assert "failed" not in measure(case, Provider(right))
    for call, name in ((scaled, " is off"), (without_numbers, "nan"), (wrong_gradient, "gradient")):
        row = measure(case, Provider(call))
        assert name in row["failed"]
        assert "forward_ms" not in row
        assert "training_ms" not in row
    registry.configure({op: registry.AUTO})


def test_all_rows_count_in_a_parameter_gradient() -> None:
    case = cases_of("norm", replace(TOY, lengths=(5000,), hidden=4))[0]
    assert "failed" not in measure(case, case.providers["fulmen torch"]())
    registry.configure({"norm": registry.AUTO})


def test_a_pass_without_memory_leaves_the_other() -> None:
    case = cases_of("swiglu", TOY)[0]

    def hungry(inputs: Any) -> None:
        raise torch.OutOfMemoryError("no")

    row = measure(case, Provider(lambda gate, up: gate, training=hungry, is_checked=False))
    assert row["forward_ms"] >= 0
    assert row["training_skipped"] == "out of memory"
    assert "training_ms" not in row


def test_median_of_times() -> None:
    calls: list[int] = []
    milliseconds = median_ms(lambda index: (calls.append(index), time.sleep(0.002)), 0.01, CPU)
    assert 1.9 < milliseconds < 50
    assert calls[:3] == [0, 1, 0]
    assert 5 <= len(calls) <= 8


class Collected(list[Any]):
    """A sender that keeps what is sent."""

    def send(self, message: tuple[str, Any]) -> None:
        self.append(message)

    def close(self) -> None:
        pass


def test_a_run_from_jobs_to_tables(tmp_path: Path) -> None:
    plan = Plan(
        TOY, ("swiglu", "experts"), ("fulmen torch",), device="cpu", dtype="float32", seconds=0.0
    )
    sent = Collected()
    work(plan, 0, None, {}, sent)  # type: ignore[arg-type]
    (kind, facts), *rest = sent
    assert kind == "facts"
    assert facts["ceilings"]["copy_tb_per_s"] > 0
    rows = [row for _, row in rest]
    assert [row["provider"] for row in rows] == ["fulmen torch", "bare grouped_mm", "fulmen torch"]
    baselines = {"experts": "bare grouped_mm"}
    write(tmp_path, facts, rows, baselines)
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == rows
    text = (tmp_path / "kernels.md").read_text()
    assert "## swiglu" in text
    assert "## experts" in text
    assert "% of bare grouped_mm" in text
    share = with_baselines(rows, baselines)[2]["training_of_baseline"]
    assert share == pytest.approx(100 * rows[1]["training_ms"] / rows[2]["training_ms"], abs=0.1)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]


def test_no_job_begins_when_the_time_is_up() -> None:
    plan = Plan(TOY, ("swiglu",), ("fulmen",), device="cpu", dtype="float32")
    sent = Collected()
    work(plan, 0, time.time() - 1, CEILINGS, sent)  # type: ignore[arg-type]
    assert [row["failed"] for _, row in sent] == ["not begun, the time was up"] * 2


def broken_work(plan: Plan, position: int, deadline: Any, ceilings: Any, sender: Any) -> None:
    """The second job crashes, the third hangs."""
    if not ceilings:
        sender.send(("facts", {"ceilings": CEILINGS}))
    for index, (case, name) in enumerate(plan.jobs()):
        if index < position:
            continue
        if index == 1:
            os._exit(3)
        if index == 2:
            time.sleep(60)
        sender.send(("row", {"op": case.op, "provider": name, "number": index}))


def test_a_crash_and_a_hang_cost_a_row_each() -> None:
    plan = Plan(TOY, ("silu_qkv", "rope"), ("fulmen",), stall_s=0.5)
    facts: list[Any] = []
    rows: list[dict[str, Any]] = []
    run_jobs(plan, facts.append, rows.append, worker=broken_work, start_method="fork")
    assert len(facts) == 1
    assert [row.get("number", row.get("failed")) for row in rows] == [
        0,
        "the process ended with 3",
        "no answer in 0.5 s",
        3,
    ]
    assert rows[1]["op"] == "silu_qkv"
    assert rows[2]["op"] == "rope"


def test_goals_take_the_best_of_ours() -> None:
    def row(op: str, case: str, provider: str, **values: float) -> dict[str, Any]:
        return {"op": op, "case": case, "provider": provider, **values}

    rows = [
        row("lightning", "32768", "fulmen triton", forward_ms=0.7, forward_ns_per_token=20.0),
        row("lightning", "32768", "fulmen torch", forward_ms=0.1, forward_ns_per_token=1.0),
        row("lightning", "32768 in 64 documents", "fulmen triton", forward_ms=0.84),
        row("lightning", "1048576", "fulmen triton", forward_ns_per_token=20.5),
        row("rope", "8192", "fulmen triton", forward_percent=84.0),
        row("experts", "16384 rows", "fulmen grouped_mm", training_of_baseline=86.0),
        row("experts", "16384 rows", "fulmen triton", training_of_baseline=60.0),
        row("cross_entropy", "8192", "fulmen triton", training_rate=560.0, extra_gib=3.2),
    ]
    found = {what: (reached, met) for what, _, reached, met in goals(rows)}
    assert found == {
        "lightning forward, 32K": ("0.7", "yes"),
        "lightning packed, forward": ("1.2", "no"),
        "lightning per token at 1M, forward": ("1.025", "yes"),
        "rope 8192, forward": ("84", "no"),
        "experts 16384 rows, forward + backward": ("86", "yes"),
        "cross_entropy 8192, forward + backward": ("560", "yes"),
        "cross_entropy 8192, extra memory": ("3.2", "no"),
    }
    assert "## Goals" in markdown({}, rows, {})


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    plan, output = command["read_options"](["ops=[rope]", "lengths=[64,128]", "seconds=0.5"])
    assert plan.ops == ("rope",)
    assert plan.settings.lengths == (64, 128)
    assert output is None
    assert plan.seconds == 0.5
    assert plan.settings.hidden == 6144
    with pytest.raises(SystemExit, match="unknown option lenghts"):
        command["read_options"](["lenghts=[3]"])
    with pytest.raises(SystemExit, match="no op ropes"):
        command["read_options"](["ops=[ropes]"])
    if not torch.cuda.is_available():
        command["main"]([])
        assert "nothing to measure" in capsys.readouterr().out
