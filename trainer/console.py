"""The console of a run: a live progress line on a terminal, a readable line a row elsewhere."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Value = float | int | str | list[list[float]] | None
Row = Mapping[str, Value]


def console_sink(total_tokens: int | None, total_steps: int | None) -> "LiveConsole | PlainConsole":
    """A live progress line where stderr is a terminal that can draw one, else a line a step."""
    text = StepText(total_tokens, total_steps)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveConsole(text, Console(stderr=True))
    return PlainConsole(text)


def short_number(value: Value) -> str:
    """A number to three digits or so, with k, M, B (10^9) or T (10^12); `-` for none."""
    if not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    scaled = float(value)
    if abs(scaled) < 999.5:
        return f"{scaled:.0f}"
    for unit in ("k", "M", "B"):
        scaled /= 1000
        if abs(scaled) < 999.95:
            return f"{scaled:.1f}{unit}"
    return f"{scaled / 1000:.1f}T"


def clock(seconds: float | None) -> str:
    """A time span as 1:02, 3:01:02 or 2d 3:01:02; `-` for none."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{minute}:{second:02d}"
    if hours:
        text = f"{hour}:{minute:02d}:{second:02d}"
    return f"{days}d {text}" if days else text


class StepText:
    """Words for the console, and how far the run is."""

    def __init__(
        self,
        total_tokens: int | None,
        total_steps: int | None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_tokens = total_tokens
        self._total_steps = total_steps
        self._now = now
        self._first: tuple[float, float] | None = None

    def fraction(self, step: int, tokens: int) -> float | None:
        """How much of the run is done, 0 to 1, by the limit that is nearer; None without one."""
        parts = [
            done / total
            for done, total in ((step, self._total_steps), (tokens, self._total_tokens))
            if total
        ]
        return min(1.0, max(parts)) if parts else None

    def seconds_left(self, fraction: float | None) -> float | None:
        """Time left at the pace since the first row, which is that of the run with its pauses.

        The first row only starts the clock: compiling and warming up are behind it.
        """
        if fraction is None:
            return None
        if self._first is None:
            self._first = (self._now(), fraction)
        started, first = self._first
        if fraction >= 1.0:
            return 0.0
        if fraction <= first:
            return None
        return (self._now() - started) * (1.0 - fraction) / (fraction - first)

    def step(self, step: int) -> str:
        """`  12/400`, or `    12` where the number of steps is not known."""
        if self._total_steps is None:
            return f"{step:>6}"
        return f"{step:>{max(5, len(str(self._total_steps)))}}/{self._total_steps}"

    def tokens(self, tokens: int) -> str:
        """`1.2M`, or `1.2M/4.0M` where tokens alone say when the run ends."""
        if self._total_tokens is None or self._total_steps is not None:
            return short_number(tokens)
        return f"{short_number(tokens)}/{short_number(self._total_tokens)}"


def _number(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return format(value, form) if isinstance(value, int | float) else "-"


def _scores_text(scores: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {accuracy:.0%}" for name, accuracy in scores.items())


def _stage(row: Row) -> str:
    return f"  {row['stage']}" if row.get("stage") else ""


def _preference(row: Row) -> str:
    """What a step on pairs has beside its loss."""
    if "reward_margin" not in row:
        return ""
    right = _number(row, "reward_accuracy", ".0%")
    return f"  margin {_number(row, 'reward_margin', '.3f')}  right {right}"


def _values_text(values: Mapping[str, float]) -> str:
    """`loss web 4.100  books 4.250`, metric after metric, of values by `METRIC/SOURCE`."""
    words, before = [], ""
    for name, value in values.items():
        metric, source = name.split("/", 1)
        words.append(
            f"{source} {value:.3f}" if metric == before else f"{metric} {source} {value:.3f}"
        )
        before = metric
    return "  ".join(words)


class PlainConsole:
    """A readable line for each row, for SLURM logs and CI."""

    def __init__(self, text: StepText) -> None:
        self._text = text

    def log_step(self, row: Row) -> None:
        step, tokens = row["step"], row["tokens"]
        assert isinstance(step, int)
        assert isinstance(tokens, int)
        left = self._text.seconds_left(self._text.fraction(step, tokens))
        self._say(
            f"step {self._text.step(step)}{_stage(row)}  tokens {self._text.tokens(tokens)}"
            f"  loss {_number(row, 'loss', '.3f')}{_preference(row)}"
            f"  grad {_number(row, 'grad_norm', '.2f')}"
            f"  lr {_number(row, 'lr', '.1e')}  {short_number(row.get('tokens_per_s'))} tok/s"
            f"  mfu {_number(row, 'mfu', '.1%')}  eta {clock(left)}"
        )

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._say(
            f"eval {self._text.step(step)}  tokens {self._text.tokens(tokens)}"
            f"  {_values_text(values)}"
        )

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        self._say(
            f"eval {self._text.step(step)}  tokens {self._text.tokens(tokens)}"
            f"  right {_scores_text(scores)}"
        )

    def close(self, *, failed: bool) -> None:
        pass

    @staticmethod
    def _say(line: str) -> None:
        # sys.stderr is looked up each time: tests and wrappers replace it.
        print(line, file=sys.stderr, flush=True)


class LiveConsole:
    """One line that is drawn anew; evaluations and whatever else is printed scroll above it."""

    def __init__(self, text: StepText, console: Console) -> None:
        self._text = text
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")
        self._progress.start()

    def log_step(self, row: Row) -> None:
        step, tokens = row["step"], row["tokens"]
        assert isinstance(step, int)
        assert isinstance(tokens, int)
        fraction = self._text.fraction(step, tokens)
        numbers = (
            f"{self._text.tokens(tokens)} tokens  loss {_number(row, 'loss', '.3f')}"
            f"{_preference(row)}"
            f"  {short_number(row.get('tokens_per_s'))} tok/s  mfu {_number(row, 'mfu', '.1%')}"
            f"  eta {clock(self._text.seconds_left(fraction))}"
        )
        self._progress.update(
            self._task,
            description=f"step {self._text.step(step).strip()}{_stage(row)}",
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
            numbers=numbers,
        )

    def log_eval(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._progress.console.print(
            f"eval {self._text.step(step).strip()}  {_values_text(values)}",
            markup=False,
            highlight=False,
        )

    def log_scores(self, step: int, tokens: int, scores: Mapping[str, float]) -> None:
        self._progress.console.print(
            f"eval {self._text.step(step).strip()}  right {_scores_text(scores)}",
            markup=False,
            highlight=False,
        )

    def close(self, *, failed: bool) -> None:
        self._progress.stop()
