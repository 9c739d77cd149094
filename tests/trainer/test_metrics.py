"""The sinks of a run's metrics: what is written can be read back, and no sink but one matters."""

import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from support.rows import open_logger, step_row, warnings_of

from fulmen.trainer.console import LiveConsole, StepText, clock, short_number
from fulmen.trainer.metrics import (
    JsonlSink,
    LogConfig,
    drop_redone_rows,
    encode_row,
    read_metrics,
)

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
