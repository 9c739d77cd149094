"""Metrics of a run: metrics.jsonl, which is the truth, and wandb, TensorBoard, console beside it.

Only rank 0 makes a `MetricsLogger`. Whatever goes wrong in a sink other than metrics.jsonl is
warned about once, and the run goes on without that sink. What each metric means: docs/metrics.md.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fulmen.trainer.alerts import Alert, AlertSink
from fulmen.trainer.console import Row, console_sink
from fulmen.trainer.viewers import TensorboardSink, WandbSink, warn_lost

WANDB_CHOICES = ("online", "offline", "off")
MOST_HELD = 2**26
"""Bytes of rows that wait for a disk with room."""
EVAL_PREFIX = "eval_loss/"
"""Of held-out cross entropies by source."""
ACCOUNT_PREFIX = "tokens/"
LOSS_PREFIX = "loss/"
"""Of a step's cross entropies by source."""

logger = logging.getLogger(__name__)


@dataclass
class LogConfig:
    """What is logged, how often and to where."""

    every_steps: int = 1
    """Steps from one logged row to the next; the trainer makes no row in between."""
    wandb: str = "off"
    """Weights & Biases: online, offline (files under the run's folder, for `wandb sync`) or off."""
    wandb_project: str = "fulmen"
    """The wandb project that the run belongs to."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run's folder `tensorboard/`."""
    expert_load_every_steps: int = 100
    """Steps from one row with the load of each expert to the next; a multiple of every_steps."""
    alerts: bool = True
    """Warn, in the log and on wandb, of spikes, slow steps and silence."""

    def __post_init__(self) -> None:
        check_log_config(self)


def check_log_config(config: LogConfig) -> None:
    """Raise a ValueError that names the key if a value of the `log` group makes no sense."""
    if config.wandb not in WANDB_CHOICES:
        hint = ""
        if str(config.wandb) == "False":
            hint = ' (YAML reads a bare off as false: write wandb: "off")'
        raise ValueError(
            f"log.wandb={config.wandb!r}: choose one of {', '.join(WANDB_CHOICES)}{hint}"
        )
    if config.every_steps < 1:
        raise ValueError(f"log.every_steps={config.every_steps}: must be 1 or more")
    if config.expert_load_every_steps < 1:
        raise ValueError(
            f"log.expert_load_every_steps={config.expert_load_every_steps}: must be 1 or more"
        )


class Sink(Protocol):
    """Where rows go."""

    def log_step(self, row: Row) -> None:
        """Take the row of a training step."""

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Take the values of an evaluation, named `METRIC/SOURCE`."""

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        """Take scores of long texts and of images, 0 to 1, by name."""

    def close(self, *, failed: bool) -> None:
        """Write out what is still held; `failed` says that the run ends by an exception."""


class MetricsLogger:
    """Hands the rows of a run to all its sinks.

    run_dir exists. run_name is the run's name on wandb, the same after a requeue. resume_step is
    the step that the run goes on from, 0 for a new one. The totals, where known, give the time
    left; the run ends at the one that is reached first.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        run_name: str,
        run_config: dict[str, Any],
        resume_step: int,
        total_tokens: int | None,
        total_steps: int | None,
    ) -> None:
        check_log_config(config)
        self._jsonl = JsonlSink(run_dir / "metrics.jsonl", resume_step=resume_step)
        self._others: list[Sink] = [console_sink(total_tokens, total_steps)]
        self._send: Callable[[Alert], None] = lambda alert: None
        if config.wandb != "off":
            wandb = WandbSink(
                run_dir, config, run_name=run_name, run_config=run_config, resume_step=resume_step
            )
            self._others.append(wandb)
            self._send = wandb.send_alert
        if config.alerts:
            # Not at the top of the file: it brings torch, and a configuration is checked before.
            from fulmen.parallel.progress import place

            self._others.append(AlertSink(self._send, place=place))
        if config.tensorboard:
            try:
                self._others.append(TensorboardSink(run_dir, resume_step=resume_step))
            except ImportError as error:
                logger.warning(
                    "log.tensorboard=true, but TensorBoard cannot be imported (%s): "
                    "pip install tensorboard. The run goes on without it.",
                    error,
                )
            except Exception as error:
                warn_lost("TensorboardSink", error)

    def log_step(self, row: Row) -> None:
        """Log a training step; `row` holds at least `step` and `tokens`."""
        self._jsonl.log_step(row)
        self._to_others(lambda sink: sink.log_step(row))

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Log an evaluation after `step`; its values are named `METRIC/SOURCE`."""
        self._jsonl.log_eval(step, tokens, values)
        self._to_others(lambda sink: sink.log_eval(step, tokens, values))

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        """Log scores after `step`: `TASK/LENGTH` of long texts, `reading/SOURCE/NAME` of images."""
        self._jsonl.log_scores(step, tokens, scores)
        self._to_others(lambda sink: sink.log_scores(step, tokens, scores))

    def alert(self, title: str, text: str) -> None:
        """Send to wandb, where there is wandb, what the log says; from any thread."""
        self._send(Alert(title, text))

    def close(self, *, failed: bool = False) -> None:
        """Close every sink; may be called again. `OSError` if rows could not be written."""
        self._to_others(lambda sink: sink.close(failed=failed))
        self._others = []
        self._jsonl.close(failed=failed)

    def _to_others(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._others):
            try:
                action(sink)
            except Exception as error:
                self._others.remove(sink)
                warn_lost(type(sink).__name__, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


class NullMetrics:
    """What the ranks other than 0 log to: nothing."""

    def log_step(self, row: Row) -> None:
        """Drop a row."""

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Drop an evaluation."""

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        """Drop an evaluation."""

    def alert(self, title: str, text: str) -> None:
        """Drop an alert."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class JsonlSink:
    """A JSON object a line, written at once, so that a killed run loses nothing it has logged.

    What a full disk does not take stays in memory and goes first with the next row: from where it
    broke off, so that no line is torn. Beyond `MOST_HELD` bytes it is an error.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        drop_redone_rows(path, resume_step=resume_step)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._held = b""

    def log_step(self, row: Row) -> None:
        had_all = not self._held
        self._held += encode_row(row).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if len(self._held) > MOST_HELD:
                raise
            if had_all:
                kept = "rows are kept in memory until it can"
                logger.error("%s cannot be written (%s): %s", self._path, error, kept)
        else:
            if not had_all:
                logger.info("%s has all rows again", self._path)

    def _write(self) -> None:
        while self._held:
            self._held = self._held[self._file.write(self._held) :]

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        named = {f"eval_{name}": value for name, value in values.items()}
        self.log_step({"step": step, "tokens": tokens, **named})

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        self.log_step({"step": step, "tokens": tokens, **scores})

    def close(self, *, failed: bool) -> None:
        if self._file.closed:
            return
        try:
            self._write()
        except OSError as error:
            rows = self._held.count(b"\n")
            logger.error("%s lacks the last %d rows: %s", self._path, rows, error)
            if not failed:
                raise
        finally:
            self._file.close()


def encode_row(row: Row) -> str:
    """`row` as valid JSON: NaN and infinities become null, and `nonfinite` says which was what."""
    assert "nonfinite" not in row
    nonfinite = {
        key: str(float(value))
        for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    clean: dict[str, Any] = {k: None if k in nonfinite else v for k, v in row.items()}
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, allow_nan=False)


def _decode_line(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None where the line is torn or no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in their order, NaN and infinities as floats again.

    A torn last line (a run that writes, or was killed) is left out; any other line that is no
    row is left out with a warning that names it.
    """
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = _decode_line(line)
        if row is None:
            if number < len(lines):
                logger.warning("%s line %d is no row of metrics; left out", path, number)
            continue
        row.update({key: float(text) for key, text in row.pop("nonfinite", {}).items()})
        rows.append(row)
    return rows


def drop_redone_rows(path: Path, *, resume_step: int) -> None:
    """Take the rows after `resume_step` out of a metrics.jsonl: the run does that work again.

    With resume_step 0 every row goes, that of an evaluation before the first step included. A
    line that is no row goes too. The file is replaced at one stroke, or left alone.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    kept, redone, broken = [], 0, 0
    for line in data.split(b"\n"):
        if not line:
            continue
        row = _decode_line(line)
        if row is None:
            broken += 1
        elif resume_step == 0 or row["step"] > resume_step:
            redone += 1
        else:
            kept.append(line + b"\n")
    trimmed = b"".join(kept)
    if trimmed == data:
        return
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        file.write(trimmed)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    logger.info(
        "%s: dropped %d rows after step %d (that work is done again) and %d torn lines",
        path,
        redone,
        resume_step,
        broken,
    )
