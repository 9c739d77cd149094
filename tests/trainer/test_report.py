"""The report of a run: one page that holds the run's figures and harms nobody who opens it."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.pages import Page

from fulmen.trainer.charts import draw_load
from fulmen.trainer.curves import MAX_POINTS, merge_rows
from fulmen.trainer.metrics import JsonlSink, read_metrics
from fulmen.trainer.report import head_facts, write_page, write_report


def write_run(run_dir: Path, *, steps: int = 20, source: str = "stdlib", **changes: Any) -> None:
    run_dir.mkdir(parents=True)
    sink = JsonlSink(run_dir / "metrics.jsonl", resume_step=0)
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "tokens": 1000 * step,
            "loss": 8.0 - step / steps,
            "grad_norm": 0.5,
            "lr": 1e-3,
            "step_time_s": 0.5,
            "tokens_per_s": 2000.0,
            "mfu": None,
            "mfu_palm": None,
            "drop_rate": 0.0,
            "expert_imbalance": 1.25,
            "memory_gib": 2.0,
        }
        sink.log_step({**row, **changes})
    sink.log_eval(steps, 1000 * steps, {f"loss/{source}": 7.125})
    sink.close(failed=False)


def test_accuracies_of_a_tower(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    sink = JsonlSink(tmp_path / "run" / "metrics.jsonl", resume_step=20)
    for step, share in ((20, 0.5), (21, 0.75)):
        values = {"contrastive_accuracy/captions": share, "zero_shot/digits": share / 2}
        sink.log_eval(step, 1000 * step, values)
    sink.close(failed=False)
    page = write_report(tmp_path / "run").read_text()
    assert "Held-out accuracy" in page
    facts = head_facts(merge_rows(read_metrics(tmp_path / "run" / "metrics.jsonl")), {})
    assert facts["Final accuracy, contrastive, captions"] == "75.0%"
    assert facts["Final accuracy, zero-shot, digits"] == "37.5%"


def test_training_loss_by_source(tmp_path: Path) -> None:
    write_run(tmp_path / "run", **{"loss/web": 7.5, "loss/8192": 6.5})
    page = write_report(tmp_path / "run").read_text()
    labels = [value for name, value in Page(page).attributes if name == "aria-label"]
    assert labels[:2] == ["Loss", "Training loss by source"]
    assert not any("Long texts" in label for label in labels if label)
    assert ">web<" in page


def test_page_holds_curves_values_config_and_samples(tmp_path: Path) -> None:
    run_dir = tmp_path / "text01_tiny" / "run-1"
    write_run(run_dir, mfu=0.41)
    (run_dir / "config.yaml").write_text("seed: 1234\n")
    summary = {
        "parameters": 3_456_789,
        "unigram_loss": 7.5,
        "active_parameters": 1_000_000,
        "samples": ["def f():\n    return 1"],
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text())
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert labels == [
        "Loss",
        "Learning rate",
        "Gradient norm, before clipping",
        "Throughput, all devices",
        "Model FLOPs utilisation",
        "Expert imbalance, 1 is perfect",
        "Dropped expert assignments",
        "Peak memory of rank 0",
    ]
    text = "\n".join(page.texts)
    for part in (
        "text01_tiny/run-1",
        "3,456,789 (3.5M)",
        "20,000 (20.0k)",
        "7.0000",
        "7.1250",
        "0:10",
        "unigram model: 7.50",
        "held out: stdlib",
        "cross entropy, nats per label",
        "tokens/s",
        "GiB",
        "Active parameters",
        "1,000,000",
        "seed: 1234",
        "def f():\n    return 1",
    ):
        assert part in text, part


def test_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "image", "object"} & set(page.tags)
    targets = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(target and target.startswith("#") for target in targets)
    assert "@import" not in text
    assert all(part.startswith("#") for part in re.findall(r"url\(([^)]*)\)", text))


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("$x$")</script>'
    run_dir = tmp_path / "run"
    write_run(run_dir, source=evil)
    (run_dir / "config.yaml").write_text(f"note: '{evil}'\n")
    (run_dir / "summary.json").write_text(
        json.dumps({evil: evil, "samples": [evil, "</pre>" + evil]})
    )
    text = write_report(run_dir).read_text()
    assert "<script" not in text.lower()
    page = Page(text)
    assert evil in page.texts
    assert f"held out: {evil}" in "".join(page.texts)
    assert page.tags.count("pre") == 3


def test_unknown_mfu_has_no_curve_and_nonfinite_losses_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", loss=math.nan)
    text = write_report(tmp_path / "run").read_text()
    assert "Model FLOPs" not in text
    assert "20, the first at step 1" in text
    assert "Final training loss" not in text
    assert 'aria-label="Loss"' in text


@pytest.mark.fast
def test_repeated_steps_count_once() -> None:
    rows = [
        {"step": 1, "tokens": 10, "loss": 5.0, "step_time_s": 2.0},
        {"step": 3, "tokens": 30, "loss": 4.0, "step_time_s": 1.0},
        {"step": 3, "tokens": 30, "eval_loss/a": 4.5},
        {"step": 3, "tokens": 30, "loss": 3.0, "step_time_s": 3.0},
    ]
    merged = merge_rows(rows)
    assert [row["step"] for row in merged] == [1, 3]
    facts = head_facts(merged, {})
    assert facts["Final training loss"] == "3.0000"
    assert facts["Final evaluation loss, a"] == "4.5000"
    assert facts["Time in training steps"] == "0:08"


def test_long_runs_stay_small(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=10 * MAX_POINTS)
    assert write_report(tmp_path / "run").stat().st_size < 600_000


@pytest.mark.fast
def test_run_without_rows_and_folder_without_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not found"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has been logged yet" in write_report(tmp_path).read_text()
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"summary\.json: must hold one JSON object"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(IsADirectoryError):
        write_page(tmp_path / "page", "title", [])
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_command_line(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command = [sys.executable, "-m", "fulmen.trainer.report"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
    failed = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")


def test_stages_and_accounts_have_their_places(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    for step, stage, seq_len in [(1, "pretrain", 8192), (2, "pretrain", 8192), (3, "to_1m", 2**20)]:
        row = {"step": step, "tokens": 1000 * step, "loss": 5.0, "stage": stage}
        account = {"tokens/books/long": 700 * step, "tokens/qa/short": 300 * step}
        sink.log_step({**row, "seq_len": seq_len, **account})
    sink.log_eval(3, 3000, {"loss/books": 4.0})
    sink.close(failed=False)
    page = Page(write_report(tmp_path).read_text())
    text = "\n".join(page.texts)
    assert "from step 1, 1.0k tokens, in rows of 8,192" in text
    assert "from step 3, 3.0k tokens, in rows of 1,048,576" in text
    assert page.texts.count("to_1m") == 2  # in the curve, and in the table
    assert "books, long" in text
    assert "2,100" in text
    assert "900" in text


def test_what_only_some_runs_have_gets_its_place(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=0)
    for step in (1, 2):
        row = {"step": step, "tokens": 1000 * step, "loss": 5.0, "step_time_s": 2.0}
        load = [[1.0, 0.0, 4.0], [1.0, 1.5, 0.5]]
        sink.log_step(
            {**row, "grad_norm/router": 0.5, "expert_load": load, "checkpoint_stall_s": 0.1}
        )
    sink.log_eval(2, 2000, {"dpo_loss/pairs": 0.5})
    sink.log_scores(2, 2000, {"niah/64": 0.5, "niah/128": 0.25})
    sink.close(failed=False)
    page = Page(write_report(tmp_path).read_text())
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert labels == [
        "Loss",
        "Gradient norm by part of the model",
        "Held up by a checkpoint",
        "Held out, dpo loss",
        "Long texts, niah",
    ]
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 2
    assert all(picture and picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "0.2 s, 5.00% of it" in page.texts


@pytest.mark.fast
def test_heat_map_is_pale_where_fair_and_red_where_busy() -> None:
    pixels = draw_load([[1.0, 0.0, 4.0, 9.0]], cell=2)
    assert pixels.shape == (2, 8, 3)
    fair, idle, busy, busier = pixels[0, ::2].tolist()
    assert min(fair) > 220
    assert busy == busier
    assert idle[2] > idle[0]
    assert busy[0] > busy[2]
