"""Alerts: what is odd is told once, what is usual is not."""

import threading
from typing import Any

import pytest

from fulmen.trainer.alerts import LEAST, Alert, AlertSink

pytestmark = pytest.mark.fast


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def row(step: int, **changes: Any) -> dict[str, Any]:
    usual = {"loss": 4.0 - step / 100 + 0.02 * (step % 3), "grad_norm": 0.5 + step % 2}
    return {
        "step": step,
        "tokens": step,
        "step_time_s": 1.0,
        "data_wait_s": 0.5,
        **usual,
        **changes,
    }


def alerts_of(rows: list[dict[str, Any]], clock: Clock | None = None) -> list[Alert]:
    heard: list[Alert] = []
    sink = AlertSink(heard.append, now=clock or Clock())
    for one in rows:
        if clock:
            clock.seconds += 400.0
        sink.log_step(one)
    sink.close(failed=False)
    return heard


def test_a_usual_run_is_silent_and_a_young_one_is_not_judged() -> None:
    assert alerts_of([row(step) for step in range(200)]) == []
    young = [row(step, loss=9.0 if step == LEAST - 1 else 4.0) for step in range(LEAST)]
    assert alerts_of(young) == []


@pytest.mark.parametrize(
    ("changes", "title", "part"),
    [
        ({"loss": 6.0}, "spike of loss", "step 50: loss is 6; the median of the last 50 rows is 3"),
        ({"grad_norm": 20.0}, "spike of grad_norm", "grad_norm is 20"),
        ({"step_time_s": 4.0, "data_wait_s": 3.5}, "slow step", "waited 3.5 s for its batch"),
        ({"loss": float("nan")}, "loss is nan", "step 50"),
        ({"grad_norm": float("inf")}, "grad_norm is inf", "step 50"),
        (
            {"grad_norm": float("nan"), "skipped": 1, "rewinds": 0, "health": "skipped: its norm"},
            "step skipped",
            "step 50: skipped: its norm",
        ),
        (
            {"loss": 50.0, "skipped": 1, "rewinds": 1, "health": "skipped; back to step_40"},
            "run went back",
            "step 50: skipped; back to step_40",
        ),
    ],
)
def test_what_is_odd_is_told(
    changes: dict[str, float], title: str, part: str, messages: list[str]
) -> None:
    rows = [row(step) for step in range(50)] + [row(50, **changes)] + [row(51)]
    (alert,) = alerts_of(rows)
    assert alert.title == title
    assert part in alert.text
    assert messages == [f"alert: {alert.text}"]


def test_one_kind_is_told_again_only_after_a_while() -> None:
    rows = [row(step) for step in range(50)] + [row(step, loss=8.0) for step in range(50, 56)]
    assert [alert.text.split(":")[0] for alert in alerts_of(rows)] == ["step 50"]
    told = [alert.text.split(":")[0] for alert in alerts_of(rows, Clock())]
    assert told == ["step 50", "step 52", "step 54"]


def test_silence_is_told_once_with_the_place() -> None:
    heard: list[Alert] = []
    told = threading.Event()

    def send(alert: Alert) -> None:
        heard.append(alert)
        told.set()

    sink = AlertSink(send, place=lambda: "step 7, in 'backward' for 60 s", silence_s=0.02)
    sink.log_step(row(1))
    assert told.wait(10)
    assert not sink._changed.wait(0.1)
    sink.close(failed=False)
    (alert,) = heard
    assert alert.title == "no step"
    assert alert.text.endswith("; step 7, in 'backward' for 60 s")
