"""The sinks of a run's metrics: what is written can be read back, and no sink but one matters."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from fulmen.trainer.console import LiveConsole, StepText, clock, short_number
from fulmen.trainer.metrics import (
    JsonlSink,
    LogConfig,
    MetricsLogger,
    WandbSink,
    drop_redone_rows,
    encode_row,
    read_metrics,
    wandb_run_id,
)


def step_row(step: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "tokens": 10_000 * step,
        "loss": 4.312,
        "grad_norm": 0.811,
        "lr": 1e-3,
        "step_time_s": 0.5,
        "tokens_per_s": 12_345.6,
        "tflops_per_device": 0.01,
        "mfu": None,
        "mfu_palm": None,
        "drop_rate": 0.0,
        "expert_imbalance": 1.25,
        "memory_gib": 0.5,
        "batch_digest": "00c0ffee",
    }
    return {**row, **changes}


def open_logger(run_dir: Path, *, resume_step: int = 0, **log: Any) -> MetricsLogger:
    return MetricsLogger(
        run_dir,
        LogConfig(**log),
        run_name="tiny-1",
        run_config={"seed": 1},
        resume_step=resume_step,
        total_tokens=None,
        total_steps=400,
    )


@pytest.fixture(autouse=True)
def caplog_sees_our_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's `start_logging`, in another test of this process, cuts fulmen's log off the root."""
    monkeypatch.setattr(logging.getLogger("fulmen"), "propagate", True)


# Configuration


@pytest.mark.fast
def test_bad_log_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"log\.wandb='of': choose one of online, offline, off"):
        LogConfig(wandb="of")
    with pytest.raises(ValueError, match=r"log\.every_steps=0"):
        LogConfig(every_steps=0)


@pytest.mark.fast
def test_yaml_off_without_quotes_is_explained() -> None:
    config = OmegaConf.merge(OmegaConf.structured(LogConfig), OmegaConf.create("wandb: off"))
    with pytest.raises(ValueError, match='write wandb: "off"'):
        OmegaConf.to_object(config)


@pytest.mark.fast
def test_structured_config_gives_the_defaults() -> None:
    assert OmegaConf.to_object(OmegaConf.structured(LogConfig)) == LogConfig()


# metrics.jsonl


@pytest.mark.fast
def test_rows_are_on_disk_before_close(tmp_path: Path) -> None:
    metrics = open_logger(tmp_path)
    metrics.log_step(step_row(1))
    metrics.log_eval(1, 10_000, {"loss/stdlib": 4.5, "loss/docs": 4.75})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == step_row(1)
    assert json.loads(lines[1]) == {
        "step": 1,
        "tokens": 10_000,
        "eval_loss/stdlib": 4.5,
        "eval_loss/docs": 4.75,
    }
    metrics.close()
    metrics.close()


@pytest.mark.fast
def test_nonfinite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    row = step_row(1, loss=math.nan, grad_norm=math.inf, aux_loss=-math.inf)
    line = encode_row(row)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    parsed = json.loads(line, parse_constant=refuse)
    assert parsed["loss"] is None
    assert parsed["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "aux_loss": "-inf"}
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    (back,) = read_metrics(path)
    assert math.isnan(back["loss"])
    assert (back["grad_norm"], back["aux_loss"]) == (math.inf, -math.inf)
    assert "nonfinite" not in back


@pytest.mark.fast
def test_resume_drops_redone_rows_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [step_row(0), *(step_row(step) for step in range(1, 7)), step_row(4), step_row(5)]
    text = "".join(encode_row(row) + "\n" for row in rows)
    path.write_text(text + encode_row(step_row(6))[:57])
    with open_logger(tmp_path, resume_step=4) as metrics:
        metrics.log_step(step_row(5, loss=1.0))
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 4, 5]
    assert read_metrics(path)[-1]["loss"] == 1.0
    assert path.read_text().startswith("".join(text.splitlines(keepends=True)[:5]))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.fast
def test_new_start_leaves_nothing_of_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_row(step_row(0)) + "\n" + encode_row(step_row(3)) + "\n")
    JsonlSink(path, resume_step=0).close(failed=False)
    assert path.read_bytes() == b""


@pytest.mark.fast
def test_trimming_replaces_the_file_at_one_stroke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = "".join(encode_row(step_row(step)) + "\n" for step in (1, 2, 3))
    path.write_text(before)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_redone_rows(path, resume_step=1)
    assert path.read_text() == before
    inode = path.stat().st_ino
    drop_redone_rows(path, resume_step=3)
    assert (path.read_text(), path.stat().st_ino) == (before, inode)


@pytest.mark.fast
def test_broken_line_in_the_middle_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_row(step_row(1)) + "\n{oops\n" + encode_row(step_row(2)) + '\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} line 2 is no row of metrics; left out"
    ]


# wandb

OFFLINE_RUN = """
import sys
from pathlib import Path
from fulmen.trainer.metrics import LogConfig, MetricsLogger
with MetricsLogger(
    Path(sys.argv[1]), LogConfig(wandb="offline", wandb_project="tests"), run_name="tiny-1",
    run_config={"model": {"num_layers": 2}}, resume_step=0, total_tokens=None, total_steps=3,
) as metrics:
    for step in (1, 2, 3):
        metrics.log_step({"step": step, "tokens": 100 * step, "loss": 5.0 / step, "mfu": None,
                          "batch_digest": "ab"})
    metrics.log_eval(3, 300, {"loss/stdlib": 2.5})
"""


def test_wandb_offline_run_reads_back(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path)], check=True, timeout=60, env=environment
    )
    (path,) = tmp_path.glob("wandb/offline-run-*/run-tiny-1.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    output = subprocess.run(inspect, check=True, timeout=60, capture_output=True, text=True).stdout
    records: dict[str, list[Any]] = {}
    for line in output.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])

    (run,) = records["run"]
    assert (run["run_id"], run["project"], run["resume"]) == ("tiny-1", "tests", True)
    assert run["config"]["update"]["model"] == {"num_layers": 2}
    history = [
        {k: v for k, v in record["item"].items() if k == "_step" or k[0] != "_"}
        for record in records["history"]
    ]
    assert history == [
        {"_step": 1, "tokens": 100, "train/loss": 5.0},
        {"_step": 2, "tokens": 200, "train/loss": 2.5},
        {"_step": 3, "tokens": 300, "train/loss": 5.0 / 3, "eval/loss/stdlib": 2.5},
    ]
    axes = {m["glob_name"]: m["step_metric"] for m in records["metric"] if "glob_name" in m}
    assert axes == {"train/*": "tokens", "eval/*": "tokens"}
    assert [record["exit_code"] for record in records["exit"]] == [0]


class FakeRun:
    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.url = "somewhere"
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def fake_wandb(patch: pytest.MonkeyPatch, init: Any, *, login: bool = True) -> None:
    module = SimpleNamespace(
        Settings=lambda **_: None,
        setup=lambda _: None,
        login=lambda prompt: login,
        init=init,
    )
    patch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.fast
def test_wandb_that_raises_is_warned_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: Any) -> FakeRun:
        raise OSError("no route")

    fake_wandb(monkeypatch, init)
    with open_logger(tmp_path, wandb="online") as metrics:
        for step in range(1, 6):
            metrics.log_step(step_row(step))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    (warning,) = warnings_of(caplog)
    assert "log.wandb=online failed (OSError: no route)" in warning


@pytest.mark.fast
def test_wandb_that_is_not_installed_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with open_logger(tmp_path, wandb="offline") as metrics:
        metrics.log_step(step_row(1))
    (warning,) = warnings_of(caplog)
    assert "log.wandb=offline, but wandb cannot be imported" in warning
    assert "pip install wandb" in warning


@pytest.mark.fast
def test_wandb_without_login_does_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, lambda **_: FakeRun(), login=False)
    with open_logger(tmp_path, wandb="online") as metrics:
        metrics.log_step(step_row(1))
    (warning,) = warnings_of(caplog)
    assert "no login" in warning


@pytest.mark.fast
def test_wandb_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def init(**_: Any) -> FakeRun:
        release.wait(60)
        return FakeRun()

    fake_wandb(monkeypatch, init)
    sink = WandbSink(
        tmp_path,
        LogConfig(wandb="offline"),
        run_name="tiny-1",
        run_config={},
        queue_rows=3,
        close_timeout_s=0.1,
    )
    for step in range(1, 10):
        sink.log_step(step_row(step))
    sink.close(failed=False)
    assert not release.is_set()
    release.set()
    (warning,) = warnings_of(caplog)
    assert "did not finish" in warning


@pytest.mark.fast
def test_slow_wandb_loses_rows_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release, run = threading.Event(), FakeRun()

    def init(**_: Any) -> FakeRun:
        release.wait(60)
        return run

    fake_wandb(monkeypatch, init)
    sink = WandbSink(
        tmp_path, LogConfig(wandb="offline"), run_name="a", run_config={}, queue_rows=3
    )
    for step in range(1, 10):
        sink.log_step(step_row(step))
    release.set()
    sink.close(failed=False)
    assert [step for step, _ in run.logged] == [1, 2, 3]
    assert warnings_of(caplog) == ["wandb was too slow for 6 rows; metrics.jsonl has them."]


@pytest.mark.fast
def test_requeued_wandb_run_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = FakeRun(step=5), {}

    def init(**keys: Any) -> FakeRun:
        asked.update(keys)
        return run

    fake_wandb(monkeypatch, init)
    metrics = open_logger(tmp_path, resume_step=2, wandb="online")
    for step in range(3, 8):
        metrics.log_step(step_row(step))
    with pytest.raises(RuntimeError, match="out of memory"), metrics:
        raise RuntimeError("out of memory")
    assert (asked["id"], asked["resume"], asked["dir"]) == ("tiny-1", "allow", str(tmp_path))
    assert [step for step, _ in run.logged] == [5, 6, 7]
    assert run.exit_code == 1


@pytest.mark.fast
def test_wandb_ids_are_valid_and_distinct() -> None:
    assert wandb_run_id("text01_tiny-1.a") == "text01_tiny-1.a"
    first, second = wandb_run_id("a/b-c"), wandb_run_id("a-b/c")
    assert first != second
    assert not set(first + second) & set(":;,#?/'")
    assert len(wandb_run_id("x" * 200)) == 64


# TensorBoard


def test_tensorboard_reads_back_without_redone_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars() -> EventAccumulator:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    with open_logger(tmp_path, tensorboard=True) as metrics:
        for step in range(1, 7):
            metrics.log_step(step_row(step, loss=6.0))
        metrics.log_eval(6, 60_000, {"loss/stdlib": 5.0})
    events = scalars()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "train/mfu" not in events.Tags()["scalars"]
    assert events.Scalars("eval/loss/stdlib")[0].value == 5.0

    with open_logger(tmp_path, tensorboard=True, resume_step=4) as metrics:
        metrics.log_step(step_row(5, loss=2.0))
    losses = [(e.step, e.value) for e in scalars().Scalars("train/loss")]
    assert losses == [(1, 6.0), (2, 6.0), (3, 6.0), (4, 6.0), (5, 2.0)]
    assert scalars().Scalars("train/tokens")[-1].value == 50_000


@pytest.mark.fast
def test_missing_tensorboard_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # type: ignore[arg-type]
    with open_logger(tmp_path, tensorboard=True) as metrics:
        metrics.log_step(step_row(1))
    (warning,) = warnings_of(caplog)
    assert "pip install tensorboard" in warning


# Console


@pytest.mark.fast
def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logger(tmp_path) as metrics:
        metrics.log_step(step_row(120))
        metrics.log_step(step_row(400, mfu=0.4123, loss=math.nan, tokens=4_000_000))
        metrics.log_step(step_row(120, loss=0.5, reward_margin=0.25, reward_accuracy=0.75))
        metrics.log_eval(400, 4_000_000, {"loss/stdlib": 4.1, "loss/docs": 4.25})
        metrics.log_eval(400, 4_000_000, {"dpo_loss/a": 0.5, "reward_margin/a": -0.125})
    assert capsys.readouterr().err.splitlines() == [
        "step   120/400  tokens 1.2M  loss 4.312  grad 0.81  lr 1.0e-03  12.3k tok/s  mfu -  eta -",
        "step   400/400  tokens 4.0M  loss nan  grad 0.81  lr 1.0e-03  12.3k tok/s  mfu 41.2%"
        "  eta 0:00",
        "step   120/400  tokens 1.2M  loss 0.500  margin 0.250  right 75%  grad 0.81  lr 1.0e-03"
        "  12.3k tok/s  mfu -  eta -",
        "eval   400/400  tokens 4.0M  loss stdlib 4.100  docs 4.250",
        "eval   400/400  tokens 4.0M  dpo_loss a 0.500  reward_margin a -0.125",
    ]


@pytest.mark.fast
def test_live_line_shows_the_step_and_keeps_evaluations() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    live = LiveConsole(StepText(1_000_000, None), console)
    live.log_step(step_row(25, mfu=0.5))
    live.log_eval(25, 250_000, {"loss/[docs]": 4.25})
    live.close(failed=False)
    text = screen.getvalue()
    assert "eval 25  loss [docs] 4.250" in text
    assert "step 25 " in text
    assert "250.0k/1.0M tokens  loss 4.312  12.3k tok/s  mfu 50.0%  eta -" in text


@pytest.mark.fast
def test_broken_console_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError("reader is gone")

    monkeypatch.setattr(sys, "stderr", Broken())
    with open_logger(tmp_path) as metrics:
        metrics.log_step(step_row(1))
        metrics.log_step(step_row(2))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert len(warnings_of(caplog)) == 1


@pytest.mark.fast
def test_time_left_follows_the_pace_and_the_nearer_limit() -> None:
    clock_s = 100.0
    text = StepText(1_000, 50, now=lambda: clock_s)
    assert text.fraction(10, 500) == 0.5
    assert text.fraction(40, 500) == 0.8
    assert text.seconds_left(text.fraction(0, 200)) is None
    clock_s = 130.0
    assert text.seconds_left(text.fraction(0, 500)) == pytest.approx(50.0)
    assert text.seconds_left(text.fraction(50, 500)) == 0.0
    endless = StepText(None, None)
    assert endless.seconds_left(endless.fraction(5, 500)) is None


@pytest.mark.fast
def test_numbers_and_times_are_short() -> None:
    numbers = [0, 7.6, 999.4, 999.5, 1234, 999_949, 999_951, 1.25e9, 7.2e12, math.nan, None]
    assert [short_number(n) for n in numbers] == [
        *("0", "8", "999", "1.0k", "1.2k", "999.9k", "1.0M", "1.2B", "7.2T", "nan", "-")
    ]
    assert [clock(s) for s in (0, 62, 3599.6, 11_000, 200_000, None)] == [
        *("0:00", "1:02", "1:00:00", "3:03:20", "2d 7:33:20", "-")
    ]
