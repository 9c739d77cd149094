"""Writes one page that compares runs: their figures side by side, what differs in their
configurations, and their curves over each other. Like a report it has no scripts and no links."""

import html
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fulmen.trainer.curves import COLORS, Rows, draw_line, figure, series
from fulmen.trainer.manifest import CONFIG_FILE
from fulmen.trainer.metrics import EVAL_PREFIX
from fulmen.trainer.report import find_panels, head_facts, read_rows, read_summary, write_page
from fulmen.trainer.run_config import load_run_config, values_by_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_COMPARED = ("run_id", "run_root")
Series = tuple[list[float], list[float]]


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write the page of these runs' folders to `output`; returns it.

    `ValueError` where there are less than two, one is given twice, or has no metrics.jsonl.
    """
    if len(run_dirs) < 2:
        raise ValueError("runs: give at least two folders to compare")
    names = name_runs(run_dirs)
    runs: dict[str, Rows] = {}
    facts, configs = {}, {}
    for name, run_dir in zip(names, run_dirs, strict=True):
        runs[name] = read_rows(run_dir)
        summary = read_summary(run_dir)
        summary.pop("samples", None)
        facts[name] = head_facts(runs[name], summary)
        configs[name] = _read_config(run_dir)
    changes = differences(configs)
    output.parent.mkdir(parents=True, exist_ok=True)
    return write_page(
        output,
        f"{len(runs)} runs compared",
        [
            _table(names, facts),
            "<h2>What differs in their configurations</h2>",
            _table(names, changes) if any(changes.values()) else "<p>Nothing.</p>",
            "<h2>Curves</h2>",
            _curves(runs),
        ],
    )


def name_runs(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them all apart."""
    parts = [run_dir.resolve().parts for run_dir in run_dirs]
    if len(set(parts)) < len(parts):
        twice = next(path for path in parts if parts.count(path) > 1)
        raise ValueError(f"runs: {os.path.join(*twice)} is given twice")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def differences(configs: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Of flat configurations by run, the keys that are not alike in all; `-` for a missing one."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    unlike = [
        key
        for key in keys
        if key not in NOT_COMPARED and len({c.get(key, "-") for c in configs.values()}) > 1
    ]
    return {name: {key: config.get(key, "-") for key in unlike} for name, config in configs.items()}


def _read_config(run_dir: Path) -> dict[str, str]:
    """A run's config.yaml as values by dotted key; empty where there is none."""
    if not (run_dir / CONFIG_FILE).is_file():
        return {}
    values = values_by_key(OmegaConf.to_container(load_run_config(run_dir)))
    return {key: str(value) for key, value in values.items()}


def _table(names: Sequence[str], columns: dict[str, dict[str, str]]) -> str:
    """A row for each fact, a column for each run."""
    keys = dict.fromkeys(key for name in names for key in columns[name])
    head = "".join(
        f'<th><span style="color:{_color(index)}">&#9632;</span> {html.escape(name)}</th>'
        for index, name in enumerate(names)
    )
    lines = [f"<tr><th></th>{head}</tr>"]
    for key in keys:
        cells = "".join(f"<td>{html.escape(columns[name].get(key, '-'))}</td>" for name in names)
        lines.append(f"<tr><th>{html.escape(key)}</th>{cells}</tr>")
    return f'<div class="wide-table"><table>{"".join(lines)}</table></div>'


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _curves(runs: dict[str, Rows]) -> str:
    """A figure for each metric that a run has, with a line for each run that has it."""
    every = [row for rows in runs.values() for row in rows]
    figures = []

    def add(title: str, draw_from: Callable[[Rows], Series], unit: str, **how: Any) -> None:
        lines = {name: draw_from(rows) for name, rows in runs.items()}
        if any(x for x, _ in lines.values()):
            wide = how.pop("wide", False)
            figures.append(figure(title, partial(_draw, lines=lines, unit=unit, **how), wide=wide))

    loss = "cross entropy, nats per label"
    add("Training loss", partial(series, key="loss"), loss, wide=True)
    add("Training loss over time", _loss_over_time, loss, x_unit="hours in training steps")
    sources = dict.fromkeys(key for row in every for key in row if key.startswith(EVAL_PREFIX))
    for key in sources:
        source = key.removeprefix(EVAL_PREFIX)
        add(f"Held out: {source}", partial(series, key=key), loss, marker=True)
    for panel in find_panels(every):
        for key, name in panel.lines.items():
            title = f"{panel.title}: {name}" if name else panel.title
            how = {"scale": panel.scale, "bottom": panel.bottom, "log": panel.log}
            add(title, partial(series, key=key), panel.unit, **how)
    if not figures:
        return "<p>No step has been logged yet.</p>"
    return f'<div class="curves">{"".join(figures)}</div>'


def _loss_over_time(rows: Rows) -> Series:
    """Hours in training steps and the loss there."""
    hours, losses, before, seconds = [], [], 0, 0.0
    for row in rows:
        if "step_time_s" in row:
            seconds += row["step_time_s"] * (row["step"] - before)
            before = row["step"]
            _, loss = series([row], "loss")
            if loss:
                hours.append(seconds / 3600)
                losses += loss
    return hours, losses


def _draw(
    axes: "Axes",
    *,
    lines: dict[str, Series],
    unit: str,
    scale: float = 1.0,
    bottom: float | None = None,
    log: bool = False,
    x_unit: str = "",
    marker: bool = False,
) -> None:
    for index, (name, (x, y)) in enumerate(lines.items()):
        if x:
            values = [value * scale for value in y]
            draw_line(axes, x, values, name=name, color=_color(index), marker=marker)
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(bottom=bottom)
    axes.set_xlabel(x_unit)
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
