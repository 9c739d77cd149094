"""Writes `report.html` of a run: what was trained, its curves, its configuration, its samples.

One file without scripts or links, to be opened in a browser or sent by mail. The curves are SVG
inside the page, so that they take its colours, light or dark.

    python -m fulmen.trainer.report RUN_DIR
"""

import argparse
import base64
import html
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.trainer.charts import draw_load
from fulmen.trainer.console import clock, short_number
from fulmen.trainer.curves import (
    COLORS,
    INK,
    Panel,
    Rows,
    draw_line,
    figure,
    merge_rows,
    series,
    training_seconds,
)
from fulmen.trainer.metrics import ACCOUNT_PREFIX, EVAL_PREFIX, LOSS_PREFIX, read_metrics
from fulmen.trainer.reading.cards import CARDS_STYLE, picture_cards, score_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
.wide-table { overflow-x: auto; } .wide-table td { padding-right: 1.5rem; }
.map { width: 100%; max-height: 24rem; image-rendering: pixelated; border-radius: 3px; }
pre { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .75rem 1rem; margin: .75rem 0; }
summary { cursor: pointer; }
"""


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
    Panel("Wait for data, of one step", "seconds", {"data_wait_s": ""}),
    Panel("Held up by a checkpoint", "seconds", {"checkpoint_stall_s": ""}),
]


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write `report.html` from metrics.jsonl and, where they are, config.yaml and summary.json.

    Of summary.json, one object, `parameters`, `unigram_loss` (nats per label) and `samples` (list
    of texts) have their places; every other key becomes a line of the table. `output` is the page
    if it is not the folder's. Returns the path. Raises ValueError where there is no metrics.jsonl,
    or summary.json is no object.
    """
    rows = read_rows(run_dir)
    summary = read_summary(run_dir)
    samples = summary.pop("samples", [])
    name = "/".join(run_dir.resolve().parts[-2:])
    config_path = run_dir / "config.yaml"
    config = None
    if config_path.is_file():
        config = config_path.read_text(encoding="utf-8", errors="replace")
    parts = [
        _table(head_facts(rows, summary)),
        "<h2>Curves</h2>",
        _curves(rows, summary.get("unigram_loss")),
        *_experts(rows),
        *_stages(rows),
        *_account(rows),
        *picture_cards(run_dir),
        *_samples(samples),
        *_config(config),
    ]
    output = output or run_dir / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    return write_page(output, name, parts)


def read_rows(run_dir: Path) -> Rows:
    """A run's metrics, one row a step; ValueError where there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: not found, so there is nothing to report; give a run's folder")
    return merge_rows(read_metrics(path))


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
    try:
        draft.write_text("\n".join(page), encoding="utf-8")
        os.replace(draft, path)
    except (OSError, ValueError):  # of the text's encoding
        draft.unlink(missing_ok=True)
        raise
    return path


def read_summary(run_dir: Path) -> dict[str, Any]:
    """A run's summary.json; empty where there is none, ValueError where it is no object."""
    path = run_dir / "summary.json"
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
    skipped = [row["step"] for row in rows if row.get("skipped")]
    if skipped:
        facts["Skipped steps"] = f"{len(skipped)}, the last one is step {skipped[-1]}"
    back = [row["rewinds"] for row in rows if row.get("rewinds")]
    if back:
        facts["Times gone back"] = str(back[-1])
    seconds = training_seconds(rows)
    if seconds:
        facts["Time in training steps"] = clock(seconds)
        _, stalls = series(rows, "checkpoint_stall_s")
        if stalls:
            facts["Held up by checkpoints"] = (
                f"{sum(stalls):.1f} s, {sum(stalls) / seconds:.2%} of it"
            )
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
            figure("Loss", partial(_draw_loss, rows=rows, unigram_loss=unigram_loss), wide=True)
        )
    for panel in find_panels(rows):
        if any(series(rows, key)[0] for key in panel.lines):
            figures.append(figure(panel.title, partial(_draw, rows=rows, panel=panel)))
    if not figures:
        return "<p>No step has been logged yet.</p>"
    return f'<div class="curves">{"".join(figures)}</div>'


def find_panels(rows: Rows) -> list[Panel]:
    """All curves but that of the loss: PANELS, and those whose keys depend on the run."""
    keys = dict.fromkeys(key for row in rows for key in row if "/" in key)
    tower = accuracies(rows)
    known = {*tower.lines, *(EVAL_PREFIX + source for source in _sources(rows))}
    losses: dict[str, str] = {}  # keys with their names, and the same by title
    parts: dict[str, str] = {}
    tasks: dict[str, dict[str, str]] = {}
    held_out: dict[str, dict[str, str]] = {}
    for key in keys:
        group, _, name = key.partition("/")
        if key.startswith(LOSS_PREFIX):
            losses[key] = name
        elif group == "grad_norm":
            parts[key] = name
        elif name.isdecimal():
            tasks.setdefault(f"Long texts, {group}", {})[key] = f"{int(name):,} tokens"
        elif group.startswith("eval_") and key not in known:
            metric = group.removeprefix("eval_").replace("_", " ")
            held_out.setdefault(f"Held out, {metric}", {})[key] = name
    return [
        Panel("Training loss by source", "nats per label", losses, bottom=None),
        *PANELS[:2],
        Panel("Gradient norm by part of the model", "norm", parts, bottom=None, log=True),
        *PANELS[2:],
        *(Panel(title, "", lines, bottom=None) for title, lines in held_out.items()),
        *(Panel(title, "% of answers", lines, 100.0) for title, lines in tasks.items()),
        tower,
        Panel("Reading of held-out images", "% of answers", score_names(rows), 100.0),
    ]


def _experts(rows: Rows) -> list[str]:
    """The load of each expert, as it was first and as it is now."""
    logged = [row for row in rows if row.get("expert_load")]
    if not logged:
        return []
    maps = []
    for row in logged[:: len(logged) - 1] if len(logged) > 1 else logged:
        title = f"Step {row['step']:,}, experts across, layers down"
        maps.append(
            f'<figure><figcaption>{title}</figcaption><img class="map" alt="{title}" '
            f'src="{_png(draw_load(row["expert_load"], cell=8))}"></figure>'
        )
    note = "Pale is a fair share of the tokens, blue none, red four times as much or more."
    return [
        "<h2>Load of the experts</h2>",
        f"<p>{note}</p>",
        f'<div class="curves">{"".join(maps)}</div>',
    ]


def _png(pixels: Any) -> str:
    """An array of RGB bytes as an address that holds the picture itself."""
    from PIL import Image

    data = BytesIO()
    Image.fromarray(pixels).save(data, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _loss_keys(rows: Rows) -> list[str]:
    return ["loss", *(EVAL_PREFIX + source for source in _sources(rows))]


def _draw_loss(axes: "Axes", rows: Rows, unigram_loss: float | None) -> None:
    draw_line(axes, *series(rows, "loss"), name="training", color=COLORS[0])
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
    for index, (key, name) in enumerate(panel.lines.items()):
        tokens, values = series(rows, key)
        color = COLORS[index % len(COLORS)]
        if tokens:
            draw_line(axes, tokens, [v * panel.scale for v in values], name=name, color=color)
    axes.set_yscale("log" if panel.log else "linear")
    axes.set_ylim(bottom=panel.bottom)
    axes.set_ylabel(panel.unit)
    if len(panel.lines) > 3:  # these would hide the curves
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)
    elif len(panel.lines) > 1:
        axes.legend(frameon=False)


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
