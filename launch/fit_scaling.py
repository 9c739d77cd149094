"""Fit scaling laws: `fit_scaling.py 'runs=[runs/scaling/*]' output=DIR [KEY=VALUE ...]`.

Reads finished runs, writes fit.json and scaling.png, prints a table. trainer/scaling.py says how.
"""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from fulmen.launch.hydra_main import run_hydra


@dataclass
class FitConfig:
    """What is fitted and how."""

    runs: list[str] = MISSING
    """Folders of finished runs, or patterns of them (`runs/scaling/*`); of one kind or several."""
    output: str = MISSING
    """Folder for fit.json and scaling.png."""
    metric: str = "loss"
    """The key of metrics.jsonl that is fitted: loss, or eval_loss/SOURCE of a held-out part."""
    compute: str = "ours"
    """ours or paper: which count of the operations the table and the picture show."""
    samples: int = 200
    """Draws of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""


def fit(config: FitConfig) -> None:
    """Fit, write, print."""
    # They import torch: a mistake in the configuration is told before that.
    from fulmen.trainer.scaling import COUNTS, fit_kind, read_runs
    from fulmen.trainer.scaling_plot import draw

    if config.compute not in COUNTS:
        raise ValueError(f"compute={config.compute}: must be one of {', '.join(COUNTS)}")
    if config.samples < 1:
        raise ValueError(f"samples={config.samples}: must be at least 1")
    kinds = {
        kind: fit_kind(kind, runs, samples=config.samples, seed=config.seed)
        for kind, runs in sorted(read_runs(find_runs(config.runs), config.metric).items())
    }
    for kind, fitted in kinds.items():
        if config.compute not in fitted["fits"]:
            raise ValueError(
                f"compute={config.compute}: the paper counts dense models, and runs of kind {kind} "
                "have several experts: set compute=ours"
            )
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    made = {"metric": config.metric, "compute_unit": "PFLOP/s-day", "kinds": kinds}
    (output / "fit.json").write_text(json.dumps(made, indent=1) + "\n")
    draw(kinds, config.compute, output / "scaling.png")
    show(kinds, config.compute, Console())
    print(f"written: {output / 'fit.json'}, {output / 'scaling.png'}")


def find_runs(patterns: list[str]) -> list[Path]:
    """The folders that the patterns stand for, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern))
        if not names:
            raise ValueError(f"runs: {pattern}: there is no such folder")
        found.update({Path(name): None for name in names if Path(name).is_dir()})
    return list(found)


def show(kinds: dict[str, dict[str, Any]], count: str, console: Console) -> None:
    """Tables of the laws, with the paper's, and of the joint form."""
    table = Table("kind", "law", "a", "90 %", "b", "90 %", "paper's a", "b", title="a C^b")
    joint = Table("kind", "d", "a", "alpha", "b", "beta", "c", "gamma", "rms of log L", "points")
    for kind, fitted in kinds.items():
        fit = fitted["fits"][count]
        for name, law in fit["laws"].items():
            intervals = (fit["intervals_90"] or {}).get(name, {})
            cells = []
            for key in ("coefficient", "exponent"):
                low_high = intervals.get(key)
                span = "-" if low_high is None else " to ".join(f"{end:.3g}" for end in low_high)
                cells += [f"{law[key]:.4g}", span]
            paper = fitted["paper"][name] if fitted["paper"] else None
            cells += [f"{paper[key]:.4g}" if paper else "-" for key in ("coefficient", "exponent")]
            table.add_row(kind, name, *cells)
        table.add_section()
        if fitted["joint"] is not None:
            joint.add_row(kind, *(f"{value:.3g}" for value in fitted["joint"].values()))
    console.print(table)
    if joint.row_count:
        console.print("d + a P^alpha + b T^beta + c (P T)^gamma", highlight=False)
        console.print(joint)


def main() -> None:
    """Entry point."""
    run_hydra(fit, "fit_scaling", FitConfig)


if __name__ == "__main__":
    main()
