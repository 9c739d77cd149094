"""wandb and TensorBoard: what they got can be read back, and no failure of theirs harms a run."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import HANG_S
from support.rows import open_logger, step_row, warnings_of

from fulmen.trainer.metrics import LogConfig, read_metrics
from fulmen.trainer.viewers import WandbSink, keep_wandb_id

# wandb

OFFLINE_RUN = """
import os, signal, sys
from pathlib import Path
from fulmen.trainer.metrics import LogConfig, MetricsLogger
first, last = int(sys.argv[2]), int(sys.argv[3])
with MetricsLogger(
    Path(sys.argv[1]), LogConfig(wandb="offline", wandb_project="tests", expert_load_every_steps=1),
    run_name="tiny/1", run_config={"model": {"num_layers": 2}}, resume_step=first - 1,
    total_tokens=None, total_steps=3,
) as metrics:
    for step in range(first, last + 1):
        metrics.log_step({"step": step, "tokens": 100 * step, "loss": 5.0 / step, "mfu": None,
                          "mfu_palm": 0.5, "grad_norm/head": 0.25, "loss/web": 1.5,
                          "batch_digest": "ab"})
    if first == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    metrics.log_eval(last, 100 * last, {"loss/stdlib": 2.5})
    metrics.log_step({"step": last + 1, "tokens": 100 * last + 100, "loss": float("nan"),
                      "expert_load": [[1.0, 0.5], [2.0, 0.0]]})
"""


def offline_run(folder: Path, first: int, last: int) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    command = [sys.executable, "-c", OFFLINE_RUN, str(folder), str(first), str(last)]
    return subprocess.run(command, timeout=HANG_S, env=environment).returncode


def test_killed_run_loses_no_row_and_a_resumed_one_reads_back_from_wandb(tmp_path: Path) -> None:
    assert offline_run(tmp_path, 1, 5) == -9
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(n, 5.0 / n) for n in range(1, 6)]
    name = json.loads((tmp_path / "wandb_run.json").read_text())["id"]

    assert offline_run(tmp_path, 4, 6) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 7), 6, 7]
    path = max(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"), key=os.path.getmtime)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(inspect, check=True, timeout=HANG_S, capture_output=True, text=True)
    records: dict[str, list[Any]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])

    (run,) = records["run"]
    assert (run["run_id"], run["project"], run["resume"]) == (name, "tests", True)
    assert run["config"]["update"]["model"] == {"num_layers": 2}
    history = [
        {k: v for k, v in record["item"].items() if k == "_step" or k[0] != "_"}
        for record in records["history"]
    ]
    *steps, last = history
    shared = {"speed/mfu_palm": 0.5, "grad_norm/head": 0.25, "loss/web": 1.5}
    assert steps == [
        {"_step": 4, "tokens": 400, "train/loss": 1.25, **shared},
        {"_step": 5, "tokens": 500, "train/loss": 1.0, **shared},
        {"_step": 6, "tokens": 600, "train/loss": 5.0 / 6, **shared, "eval/loss/stdlib": 2.5},
    ]
    image = {key.removeprefix("experts/expert_load."): value for key, value in last.items()}
    assert (last["_step"], last["tokens"], last["train/loss"]) == (7, 700, "NaN")
    assert (image["_type"], image["width"], image["height"]) == ("image-file", 16, 16)
    assert (path.parent / "files" / image["path"]).is_file()
    (alert,) = records["alert"]
    assert alert["title"] == "loss is nan"
    axes = {m["glob_name"]: m["step_metric"] for m in records["metric"] if "glob_name" in m}
    groups = ("train", "loss", "eval", "grad_norm", "experts", "speed", "health", "tokens")
    assert axes == {f"{group}/*": "tokens" for group in groups}
    assert [record["exit_code"] for record in records["exit"]] == [0]


class FakeRun:
    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.url = "somewhere"
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None
        self.alerts: list[dict[str, str]] = []

    def alert(self, **words: str) -> None:
        self.alerts.append(words)

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
def test_requeued_wandb_run_goes_on_under_its_id_and_never_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep_wandb_id(tmp_path, "tiny-1", {"seed": 1}, resume_step=0)
    run, asked = FakeRun(step=5), {}

    def init(**keys: Any) -> FakeRun:
        asked.update(keys)
        return run

    fake_wandb(monkeypatch, init)
    metrics = open_logger(tmp_path, resume_step=2, wandb="online")
    for step in (3, 4, 5, 6, 4, 5, 6, 7):  # goes back within the process too
        metrics.log_step(step_row(step))
    with pytest.raises(RuntimeError, match="out of memory"), metrics:
        raise RuntimeError("out of memory")
    assert (asked["id"], asked["resume"], asked["dir"]) == (kept, "allow", str(tmp_path))
    assert [step for step, _ in run.logged] == [5, 6, 6, 7]
    assert run.exit_code == 1


@pytest.mark.fast
def test_alerts_go_to_wandb_behind_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    fake_wandb(monkeypatch, lambda **_: run)
    for key, number in ((True, 1), (False, 0)):
        run.alerts.clear()
        with open_logger(tmp_path, wandb="offline", alerts=key) as metrics:
            metrics.log_step(step_row(1, loss=float("inf")))
        assert [alert["title"] for alert in run.alerts] == ["loss is inf"] * number


@pytest.mark.fast
def test_wandb_ids_are_kept_valid_and_distinct(tmp_path: Path) -> None:
    def keep(name: str, seed: int, step: int, folder: Path = tmp_path) -> str:
        return keep_wandb_id(folder, name, {"seed": seed}, resume_step=step)

    first = keep("a/b-c", 1, 0)
    assert first.startswith("a-b-c-")
    assert keep("a/b-c", 1, 0) == first  # killed before its first checkpoint
    assert keep("a/b-c", 2, 10) == first  # gone on with, for longer
    second = keep("a/b-c", 2, 0)
    assert second != first
    assert keep("a/b-c", 2, 20) == second
    (tmp_path / "wandb_run.json").write_text('{"id"')
    assert keep("x" * 200, 2, 20) not in (first, second)
    assert len(keep("x" * 200, 2, 20)) == 64


# TensorBoard


def test_tensorboard_reads_back_without_redone_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars() -> EventAccumulator:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    with open_logger(tmp_path, tensorboard=True) as metrics:
        for step in range(1, 7):
            metrics.log_step(step_row(step, loss=6.0, expert_load=[[1.0, 0.5, 1.5]]))
        metrics.log_eval(6, 60_000, {"loss/stdlib": 5.0})
    events = scalars()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "speed/mfu" not in events.Tags()["scalars"]
    assert events.Scalars("speed/tokens_per_s")[0].value == pytest.approx(12_345.6)
    picture = events.Images("experts/expert_load")[0]
    assert (picture.width, picture.height) == (24, 8)
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
