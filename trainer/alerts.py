"""Looks for what a human should hear of: losses that jump or are none, slow steps, silence.

It only speaks: a warning in the run's log, and an alert on wandb where there is wandb. What a run
itself does about a bad step is decided by trainer/health.py, of which it tells.
"""

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fulmen.trainer.console import Row, clock
from fulmen.trainer.spikes import LEAST, highest_loss, highest_norm

WINDOW = 100
"""Rows that a row is compared with."""
SPIKE_FACTOR, SLOW_TIMES = 10.0, 3.0
"""Of a spike (trainer/spikes.py), and times the median: a slow step."""
REPEAT_S = 600.0
"""Least time between two alerts of one kind."""
SILENCE_S = 600.0
"""Least time without a row that is an alert; else SILENCE_ROWS times the usual time of one."""
SILENCE_ROWS = 20.0
_JUDGED = ("loss", "grad_norm")
"""Of a row that says `skipped`, these are no surprise any more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alert:
    """What happened, in a few words and in a sentence."""

    title: str
    text: str


class AlertSink:
    """Takes a run's rows; `send` gets each alert, from this thread or that of the silence.

    The time before the first row, when kernels are compiled, may be as long as it likes.
    """

    def __init__(
        self,
        send: Callable[[Alert], None],
        *,
        place: Callable[[], str] = lambda: "",
        silence_s: float = SILENCE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`place` says where the process is, for an alert of silence."""
        self._send, self._place, self._now = send, place, now
        self._silence_s = silence_s
        self._seen: dict[str, deque[float]] = {
            key: deque(maxlen=WINDOW) for key in ("loss", "grad_norm", "step_time_s")
        }
        self._rewinds: object = 0
        self._gaps: deque[float] = deque(maxlen=WINDOW)
        self._last_row: float | None = None
        self._said: dict[str, float] = {}
        self._changed, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._listen, name="alerts", daemon=True)
        self._thread.start()

    def log_step(self, row: Row) -> None:
        """Compare the row of a step with those before it."""
        step = row["step"]
        before, self._rewinds = self._rewinds, row.get("rewinds", 0)
        if row.get("health"):
            kind = "step skipped" if self._rewinds == before else "run went back"
            self._say(kind, f"step {step}: {row['health']}")
        for key, is_odd in (("loss", _jumps), ("grad_norm", _grows), ("step_time_s", _lasts)):
            value = row.get(key)
            if not isinstance(value, int | float) or (row.get("skipped") and key in _JUDGED):
                continue
            if not math.isfinite(value):
                self._say(f"{key} is {value}", f"step {step}: {key} is {value}")
                continue
            seen = self._seen[key]
            if len(seen) >= LEAST and is_odd(value, seen):
                text = f"step {step}: {key} is {value:.4g}; the median of the last {len(seen)} rows"
                text += f" is {statistics.median(seen):.4g}"
                if key == "step_time_s":
                    text += f"; it waited {row.get('data_wait_s') or 0:.3g} s for its batch"
                self._say("slow step" if key == "step_time_s" else f"spike of {key}", text)
            seen.append(value)
        now = self._now()
        if self._last_row is not None:
            self._gaps.append(now - self._last_row)
        self._alive(now)

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """An evaluation is a sign of life."""
        self._alive(self._now())

    log_scores = log_eval

    def close(self, *, failed: bool) -> None:
        """Listen no more."""
        self._closed = True
        self._changed.set()
        self._thread.join(5.0)

    def _alive(self, now: float) -> None:
        self._last_row = now
        self._changed.set()

    def _patience(self) -> float:
        usual = statistics.median(self._gaps) if self._gaps else 0.0
        return max(self._silence_s, SILENCE_ROWS * usual)

    def _listen(self) -> None:
        told = None
        while not self._closed:
            last = self._last_row
            left = None
            if last is not None and last != told:
                left = last + self._patience() - self._now()
                if left <= 0:
                    told = last
                    silent = clock(self._now() - last)
                    place = self._place()
                    self._say("no step", f"no step for {silent}{place and f'; {place}'}")
                    continue
            self._changed.wait(left)
            self._changed.clear()

    def _say(self, kind: str, text: str) -> None:
        now = self._now()
        if now - self._said.get(kind, -math.inf) < REPEAT_S:
            return
        self._said[kind] = now
        logger.warning("alert: %s", text)
        self._send(Alert(kind, text))


def _jumps(value: float, seen: deque[float]) -> bool:
    return value > highest_loss(seen, SPIKE_FACTOR)


def _grows(value: float, seen: deque[float]) -> bool:
    return value > highest_norm(seen, SPIKE_FACTOR)


def _lasts(value: float, seen: deque[float]) -> bool:
    return value > SLOW_TIMES * statistics.median(seen)
