"""A page that compares runs holds the figures and the curves of all of them, and no more."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import Page

from fulmen.trainer.compare import differences, name_runs, write_comparison
from fulmen.trainer.metrics import JsonlSink


def write_run(run_dir: Path, *, lr: float, loss: float, source: str = "books") -> Path:
    run_dir.mkdir(parents=True)
    sink = JsonlSink(run_dir / "metrics.jsonl", resume_step=0)
    for step in range(1, 6):
        row = {"step": step, "tokens": 1000 * step, "loss": loss - step / 10, "step_time_s": 720.0}
        sink.log_step({**row, "lr": lr, "grad_norm": 0.5, "grad_norm/experts": 0.25})
    sink.log_scores(5, 5000, {"niah/1024": 0.75})
    sink.close(failed=False)
    (run_dir / "config.yaml").write_text(
        f"run_id: {run_dir.name}\noptim: {{lr: {lr}}}\nseed: 1\n"
        f"data: {{sources: {{'{source}': {{weight: 1}}}}}}\n"
    )
    return run_dir


def test_page_has_every_run_in_each_part_and_needs_nothing_else(tmp_path: Path) -> None:
    evil = "<script>$x$"
    runs = [
        write_run(tmp_path / "tiny" / "a", lr=1e-3, loss=5.0),
        write_run(tmp_path / "tiny" / "b", lr=3e-3, loss=4.0, source=evil),
    ]
    path = write_comparison(runs, tmp_path / "new" / "page.html")
    page = Page(path.read_text())
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert labels == [
        "Training loss",
        "Training loss over time",
        "Learning rate",
        "Gradient norm, before clipping",
        "Gradient norm by part of the model: experts",
        "Long texts, niah: 1,024 tokens",
    ]
    assert page.texts.count("a") == page.texts.count("b") == len(labels)
    assert page.texts.count(" a") == page.texts.count(" b") == 2
    text = "\n".join(page.texts)
    for part in ("4.5000", "3.5000", "optim.lr", "0.001", "0.003", f"data.sources.{evil}.weight"):
        assert part in text, part
    assert "hours in training steps" in text
    assert "mathdefault" not in text
    assert not {"seed", "run_id"} & set(page.texts)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


@pytest.mark.fast
def test_names_are_as_short_as_they_can_be_and_differences_are_whole(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("x/one", "y/one", "y/two")]
    assert name_runs(folders) == ["x/one", "y/one", "y/two"]
    assert name_runs(folders[1:]) == ["one", "two"]
    with pytest.raises(ValueError, match="given twice"):
        name_runs([folders[0], tmp_path / "y" / ".." / "x" / "one"])
    configs = {"a": {"k": "1", "same": "0", "run_id": "a"}, "b": {"same": "0", "run_id": "b"}}
    assert differences(configs) == {"a": {"k": "1"}, "b": {"k": "-"}}


def test_command_line(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for name in "ab":
        write_run(tmp_path / name, lr=1e-3, loss=5.0)

    def call(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "launch/report.py", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    both = f"runs=[{tmp_path}/*]"
    done = call(both, f"output={tmp_path}/page.html")
    assert done.stdout.strip() == f"{tmp_path}/page.html", done.stderr
    assert "2 runs compared" in (tmp_path / "page.html").read_text()
    assert "output=FILE.html" in call(both).stderr
