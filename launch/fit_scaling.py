"""Fit scaling laws: `fit_scaling.py 'runs=[runs/scaling/*]' output=DIR [KEY=VALUE ...]`.

Reads finished runs, writes fit.json and scaling.png, prints a table. trainer/scaling.py says how.
"""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich import box
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
            reason = fitted["unfitted"][config.compute]
            raise ValueError(f"compute={config.compute}: runs of kind {kind}: {reason}")
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
    """A table of the laws, with the paper's, and a line a kind for the joint form."""
    table = Table("kind", "law", "a C^b", "90 % of b", "the paper's", box=box.SIMPLE, padding=0)
    for kind, fitted in kinds.items():
        fit = fitted["fits"][count]
        for name, law in fit["laws"].items():
            ends = fit["intervals_90"][name]["exponent"] if fit["intervals_90"] else None
            span = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "-"
            paper = _law(fitted["paper"][name]) if fitted["paper"] else "-"
            table.add_row(kind, name, _law(law), span, paper)
        table.add_section()
    console.print(table)
    for kind, fitted in kinds.items():
        joint = fitted["joint"]
        if joint is None:
            console.print(f"{kind}: too few points for the joint form", highlight=False)
            continue
        number = {key: f"{value:.3g}" for key, value in joint.items()}
        console.print(
            f"{kind}: L = {number['d']} + {number['a']} P^{number['alpha']} + "
            f"{number['b']} T^{number['beta']} + {number['c']} (P T)^{number['gamma']}, "
            f"rms of log L {number['rms_log_error']} over {number['points']} points",
            highlight=False,
        )


def _law(law: dict[str, float]) -> str:
    return f"{law['coefficient']:.4g} C^{law['exponent']:.4f}"


def main() -> None:
    """Entry point."""
    run_hydra(fit, "fit_scaling", FitConfig)


if __name__ == "__main__":
    main()
