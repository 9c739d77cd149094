"""Writes `report.html` of a run: what was trained, its curves, its configuration, its samples.

One file without scripts or links, to be opened in a browser or sent by mail. The curves are SVG
inside the page, so that they take its colours, light or dark.

    python -m fulmen.trainer.report RUN_DIR
"""

import argparse
import html
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.trainer.console import clock, short_number
from fulmen.trainer.metrics import ACCOUNT_PREFIX, EVAL_PREFIX, read_metrics
from fulmen.trainer.reading.cards import CARDS_STYLE, picture_cards, score_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

# Stand-ins that matplotlib draws with; in the page they become its text and line colours.
INK, FAINT = "#010203", "#040506"
# Legible on white and on near-black alike.
COLORS = ["#3b82d6", "#e0772f", "#2fa36b", "#b065c9", "#d6556b", "#8c8f35", "#1f9fa3"]
MAX_POINTS = 500

PAGE_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2025; --soft: #626973; --line: #dfe2e7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --ink: #e6e8eb; --soft: #9aa2ad; --line: #343942; }
}
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p, figcaption { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 0; overflow-wrap: break-word;
  border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); padding-right: 2.5rem; }
.curves { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); }
@media (max-width: 28rem) { .curves { grid-template-columns: 1fr; } }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; }
figcaption { font-size: .9rem; margin-bottom: .25rem; }
svg { width: 100%; height: auto; display: block; }
pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .75rem 1rem; margin: .75rem 0; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Panel:
    """A curve over tokens: the rows' keys that it shows, with their names in its legend."""

    title: str
    unit: str
    lines: dict[str, str]
    scale: float = 1.0
    bottom: float = 0.0


PANELS = [
    Panel("Learning rate", "learning rate", {"lr": ""}),
    Panel("Gradient norm, before clipping", "norm", {"grad_norm": ""}),
    Panel("Throughput, all devices", "tokens/s", {"tokens_per_s": ""}),
    Panel(
        "Model FLOPs utilisation",
        "% of the device's peak",
        {"mfu": "MFU", "mfu_palm": "PaLM convention"},
        100.0,
    ),
    Panel(
        "Expert imbalance, 1 is perfect",
        "largest share / mean share",
        {"expert_imbalance": ""},
        bottom=1.0,
    ),
    Panel("Dropped expert assignments", "% of assignments", {"drop_rate": ""}, 100.0),
    Panel("Peak memory of rank 0", "GiB", {"memory_gib": ""}),
]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from metrics.jsonl and, where they are, config.yaml and summary.json.

    Of summary.json, one object, `parameters`, `unigram_loss` (nats per label) and `samples` (list
    of texts) have their places; every other key becomes a line of the table. Returns the path.
    Raises ValueError where there is no metrics.jsonl, or summary.json is no object.
    """
    metrics_path = run_dir / "metrics.jsonl"
    if not metrics_path.is_file():
        raise ValueError(
            f"{metrics_path}: not found, so there is nothing to report; give a run's folder"
        )
    rows = merge_rows(read_metrics(metrics_path))
    summary = _read_summary(run_dir / "summary.json")
    samples = summary.pop("samples", [])
    name = "/".join(run_dir.resolve().parts[-2:])
    config_path = run_dir / "config.yaml"
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else None
    parts = [
        _table(head_facts(rows, summary)),
        "<h2>Curves</h2>",
        _curves(rows, summary.get("unigram_loss")),
        *_stages(rows),
        *_account(rows),
        *picture_cards(run_dir),
        *_samples(samples),
        *_config(config),
    ]
    return write_page(run_dir / "report.html", name, parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """A page of these parts, HTML each, in one stroke; returns the path."""
    page = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{PAGE_STYLE}{CARDS_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *parts,
        "</body></html>\n",
    ]
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("\n".join(page), encoding="utf-8")
    os.replace(draft, path)
    return path


def merge_rows(rows: Rows) -> Rows:
    """One row a step, in the order of steps; of two values of a key, the later one counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); mend or delete it") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: must hold one JSON object; mend or delete it")
    return summary


def _sources(rows: Rows) -> list[str]:
    keys = {key: None for row in rows for key in row if key.startswith(EVAL_PREFIX)}
    return [key.removeprefix(EVAL_PREFIX) for key in keys]


def accuracies(rows: Rows) -> Panel:
    """Of a tower's own pretraining: on held-out captions, and of zero-shot classification."""
    kinds = {"eval_contrastive_accuracy/": "contrastive", "eval_zero_shot/": "zero-shot"}
    lines = {
        key: f"{name}, {key.partition('/')[2]}"
        for prefix, name in kinds.items()
        for key in dict.fromkeys(key for row in rows for key in row)
        if key.startswith(prefix)
    }
    return Panel("Held-out accuracy", "% right", lines, 100.0)


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


def head_facts(rows: Rows, summary: dict[str, Any]) -> dict[str, str]:
    """The head table: names and values as text."""
    facts = {}
    if isinstance(summary.get("parameters"), int):
        count = summary["parameters"]
        facts["Parameters"] = f"{count:,} ({short_number(count)})"
    if rows:
        tokens = rows[-1]["tokens"]
        facts["Steps"] = f"{rows[-1]['step']:,}"
        facts["Tokens"] = f"{tokens:,} ({short_number(tokens)})"
    _, losses = series(rows, "loss")
    if losses:
        facts["Final training loss"] = f"{losses[-1]:.4f}"
    for source in _sources(rows):
        _, values = series(rows, EVAL_PREFIX + source)
        if values:
            facts[f"Final evaluation loss, {source}"] = f"{values[-1]:.4f}"
    for key, source in score_names(rows).items():
        _, values = series(rows, key)
        facts[f"Final reading of {source}"] = f"{values[-1]:.1%}"
    for key, name in accuracies(rows).lines.items():
        _, values = series(rows, key)
        facts[f"Final accuracy, {name}"] = f"{values[-1]:.1%}"
    if isinstance(summary.get("unigram_loss"), int | float):
        facts["Loss of a unigram model"] = f"{summary['unigram_loss']:.4f}"
    bad = [
        row["step"]
        for row in rows
        if isinstance(row.get("loss"), float) and not math.isfinite(row["loss"])
    ]
    if bad:
        facts["Logged steps without a finite loss"] = f"{len(bad)}, the first at step {bad[0]}"
    seconds = training_seconds(rows)
    if seconds:
        facts["Time in training steps"] = clock(seconds)
    for key, value in summary.items():
        if key not in ("parameters", "unigram_loss"):
            text = f"{value:,}" if type(value) is int else value
            name = key.replace("_", " ").capitalize()
            facts[name] = text if isinstance(text, str) else json.dumps(text)
    return facts


def _table(facts: dict[str, str]) -> str:
    lines = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return "<table>" + "".join(lines) + "</table>"


def stage_starts(rows: Rows) -> dict[str, dict[str, Any]]:
    """The first row of each stage that the run has been in, by its name."""
    firsts: dict[str, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.get("stage"), str):
            firsts.setdefault(row["stage"], row)
    return firsts


def _stages(rows: Rows) -> list[str]:
    starts = stage_starts(rows)
    facts = {
        name: f"from step {row['step']:,}, {short_number(row['tokens'])} tokens, in rows of "
        f"{row['seq_len']:,}"
        for name, row in starts.items()
    }
    return ["<h2>Stages</h2>", _table(facts)] if facts else []


def _account(rows: Rows) -> list[str]:
    """Tokens of the run by source and length bucket, from the last row that has them."""
    last = next((row for row in reversed(rows) if any(map(_counts, row))), {})
    facts = {
        key.removeprefix(ACCOUNT_PREFIX).replace("/", ", "): f"{value:,}"
        for key, value in last.items()
        if _counts(key)
    }
    return ["<h2>Tokens by source and length</h2>", _table(facts)] if facts else []


def _counts(key: str) -> bool:
    return key.startswith(ACCOUNT_PREFIX)


def _samples(samples: list[Any]) -> list[str]:
    if not samples:
        return []
    texts = [f"<pre>{html.escape(str(sample))}</pre>" for sample in samples]
    return ["<h2>Samples from the model</h2>", *texts]


def _config(config: str | None) -> list[str]:
    if config is None:
        return []
    return [
        "<h2>Configuration</h2>",
        f"<details><summary>config.yaml</summary><pre>{html.escape(config)}</pre></details>",
    ]


def _curves(rows: Rows, unigram_loss: float | None) -> str:
    figures = []
    if any(series(rows, key)[0] for key in _loss_keys(rows)):
        figures.append(
            _figure("Loss", partial(_draw_loss, rows=rows, unigram_loss=unigram_loss), wide=True)
        )
    reading = Panel("Reading of held-out images", "% of answers", score_names(rows), 100.0)
    for panel in (*PANELS, accuracies(rows), reading):
        if any(series(rows, key)[0] for key in panel.lines):
            figures.append(_figure(panel.title, partial(_draw, rows=rows, panel=panel)))
    if not figures:
        return "<p>No step has been logged yet.</p>"
    return f'<div class="curves">{"".join(figures)}</div>'


def _loss_keys(rows: Rows) -> list[str]:
    return ["loss", *(EVAL_PREFIX + source for source in _sources(rows))]


def _draw_loss(axes: "Axes", rows: Rows, unigram_loss: float | None) -> None:
    _line(axes, *series(rows, "loss"), name="training", color=COLORS[0])
    for index, source in enumerate(_sources(rows)):
        tokens, losses = series(rows, EVAL_PREFIX + source)
        color = COLORS[1 + index % (len(COLORS) - 1)]
        axes.plot(
            tokens,
            losses,
            "o-",
            color=color,
            markersize=4,
            linewidth=1.4,
            label=f"held out: {source}",
        )
    if unigram_loss is not None:
        name = f"unigram model: {unigram_loss:.2f}"
        axes.axhline(unigram_loss, color=INK, linestyle="--", linewidth=1, label=name)
    for name, row in list(stage_starts(rows).items())[1:]:
        axes.axvline(row["tokens"], color=INK, linestyle=":", linewidth=1)
        axes.annotate(
            name,
            (row["tokens"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
        )
    axes.set_ylabel("cross entropy, nats per label")
    axes.legend(frameon=False)


def _draw(axes: "Axes", rows: Rows, panel: Panel) -> None:
    for color, (key, name) in zip(COLORS, panel.lines.items(), strict=False):
        tokens, values = series(rows, key)
        if tokens:
            _line(axes, tokens, [v * panel.scale for v in values], name=name, color=color)
    axes.set_ylim(bottom=panel.bottom)
    axes.set_ylabel(panel.unit)
    if len(panel.lines) > 1:
        axes.legend(frameon=False)


def _line(axes: "Axes", x: list[float], y: list[float], *, name: str, color: str) -> None:
    """A curve of at most MAX_POINTS points: means, with the span of what they stand for behind."""
    size = math.ceil(len(y) / MAX_POINTS) or 1
    bins = [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]
    ends = [xs[-1] for xs, _ in bins]
    means = [sum(ys) / len(ys) for _, ys in bins]
    if size > 1:
        low, high = [min(ys) for _, ys in bins], [max(ys) for _, ys in bins]
        axes.fill_between(ends, low, high, color=color, alpha=0.25, linewidth=0)
    marker = "o" if len(bins) == 1 else None
    axes.plot(ends, means, color=color, linewidth=1.6, marker=marker, label=name)


def _figure(title: str, draw: "Callable[[Axes], None]", *, wide: bool = False) -> str:
    """The <figure> of a curve; `draw` fills its axes."""
    # Not at the top of the file: matplotlib takes its time, and training never needs it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

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
        figure = Figure(figsize=(10.4, 4.2) if wide else (5.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        short_ticks = FuncFormatter(lambda value, _: short_number(value).replace(".0", ""))
        draw(axes)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_locator(MaxNLocator(9 if wide else 5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(short_ticks)
        if axes.get_ylim()[1] >= 10_000:
            axes.yaxis.set_major_formatter(short_ticks)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--line)")
    label = html.escape(title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    attribute = ' class="wide"' if wide else ""
    return f"<figure{attribute}><figcaption>{label}</figcaption>{svg}</figure>"


def main() -> None:
    """Write the report of the run's folder given on the command line and print its path."""
    parser = argparse.ArgumentParser(description="Write report.html of a run from its metrics.")
    parser.add_argument("run_dir", type=Path, help="a run's folder, which holds metrics.jsonl")
    try:
        print(write_report(parser.parse_args().run_dir))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
