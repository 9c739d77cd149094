"""Curves over tokens as SVG inside a page, in its colours, from the rows of a metrics.jsonl."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from fulmen.trainer.console import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

# Stand-ins that matplotlib draws with; in the page they become its text and line colours.
INK, FAINT = "#010203", "#040506"
# Legible on white and on near-black alike.
COLORS = ["#3b82d6", "#e0772f", "#2fa36b", "#b065c9", "#d6556b", "#8c8f35", "#1f9fa3"]
MAX_POINTS = 500


@dataclass(frozen=True)
class Panel:
    """A curve over tokens: the rows' keys that it shows, with their names in its legend."""

    title: str
    unit: str
    lines: dict[str, str]
    scale: float = 1.0
    bottom: float | None = 0.0
    """Where the vertical axis begins; None = where the values do."""
    log: bool = False
    """A logarithmic vertical axis."""


def merge_rows(rows: Rows) -> Rows:
    """One row a step, in the order of steps; of two values of a key, the later one counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the rows where `key` is a finite number."""
    points = [
        (float(row["tokens"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    return [x for x, _ in points], [y for _, y in points]


def training_seconds(rows: Rows) -> float:
    """Time spent in training steps: mean step time x steps since the row before, summed."""
    total, before = 0.0, 0
    for row in rows:
        if isinstance(row.get("step_time_s"), int | float):
            total += row["step_time_s"] * (row["step"] - before)
            before = row["step"]
    return total


def draw_line(
    axes: "Axes", x: list[float], y: list[float], *, name: str, color: str, marker: bool = False
) -> None:
    """A curve of at most MAX_POINTS points: means, with the span of what they stand for behind."""
    size = math.ceil(len(y) / MAX_POINTS) or 1
    bins = [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]
    ends = [xs[-1] for xs, _ in bins]
    means = [sum(ys) / len(ys) for _, ys in bins]
    if size > 1:
        low, high = [min(ys) for _, ys in bins], [max(ys) for _, ys in bins]
        axes.fill_between(ends, low, high, color=color, alpha=0.25, linewidth=0)
    style = "o" if marker or len(bins) == 1 else None
    axes.plot(ends, means, color=color, linewidth=1.6, marker=style, markersize=4, label=name)


def figure(title: str, draw: "Callable[[Axes], None]", *, wide: bool = False) -> str:
    """The <figure> of a curve; `draw` fills its axes, and names x if it is not tokens."""
    # Not at the top of the file: matplotlib takes its time, and training never needs it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    style: dict[Any, Any] = {
        # Text stays text, in the page's font, and a "$" in the name of a source stays one.
        "svg.fonttype": "none",
        "text.parse_math": False,
        # Ids differ from one curve to the next, and are the same in each writing of the report.
        "svg.hashsalt": title,
        "font.size": 10.0,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(style):
        sheet = Figure(figsize=(10.4, 4.2) if wide else (5.0, 3.0), layout="constrained")
        axes = sheet.add_subplot()
        short_ticks = FuncFormatter(lambda value, _: short_number(value).replace(".0", ""))
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(9 if wide else 5, steps=[1, 2, 5, 10]))
        if not axes.get_xlabel():
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(short_ticks)
        if axes.get_yscale() == "log":  # its own labels are formulas
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif axes.get_ylim()[1] >= 10_000:
            axes.yaxis.set_major_formatter(short_ticks)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        text = StringIO()
        sheet.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    label = html.escape(title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    attribute = ' class="wide"' if wide else ""
    return f"<figure{attribute}><figcaption>{label}</figcaption>{svg}</figure>"
