"""The picture of a scaling fit: loss, parameters and tokens over compute, a colour a kind."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulmen.trainer.curves import COLORS
from fulmen.trainer.scaling import LAWS, PFLOP_S_DAY, Law

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {
    "loss": "loss, nats per token",
    "parameters": "optimal parameters N, without embedding and head",
    "tokens": "optimal tokens D",
}


def draw(kinds: dict[str, dict[str, Any]], count: str, path: Path) -> None:
    """Write a PNG of the fits by one count of the compute; the paper's laws are dashed."""
    # Not at the top of the file: matplotlib takes its time.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 5.6), layout="constrained")
    for law, axes in zip(LAWS, figure.subplots(1, len(LAWS)), strict=True):
        for color, (kind, fitted) in zip(COLORS, kinds.items(), strict=False):
            _draw_kind(axes, law, kind, fitted, count, color)
        axes.set(xscale="log", yscale="log", xlabel="compute C, PFLOP/s-days", ylabel=_UNITS[law])
        axes.grid(which="major", color="#dddddd", linewidth=0.8)
        axes.grid(which="minor", color="#eeeeee", linewidth=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2
        )
    figure.savefig(path, dpi=110)


def _draw_kind(
    axes: "Axes", law: str, kind: str, fitted: dict[str, Any], count: str, color: str
) -> None:
    fit = fitted["fits"][count]
    optima = fit["frontier"]
    compute = np.array(optima["compute"])
    axes.plot(compute, optima[law], ".", color=color, markersize=3)
    if law == "loss":
        for size in fitted["sizes"]:
            spent = np.array(size["tokens"]) * size["flops_per_token"][count] / PFLOP_S_DAY
            axes.plot(spent, size["losses"], color=color, linewidth=0.6, alpha=0.5)
    line = Law(**fit["laws"][law])
    ends = np.array([compute[0], compute[-1]])
    axes.plot(ends, line.at(ends), color=color, linewidth=1.8, label=f"{kind}: {_text(line)}")
    if fitted["paper"] is not None:
        paper = Law(**fitted["paper"][law])
        label = f"{kind}, paper: {_text(paper)}"
        axes.plot(ends, paper.at(ends), "--", color=color, linewidth=1.2, label=label)


def _text(law: Law) -> str:
    return f"{law.coefficient:.3g} C^{law.exponent:.3g}"
