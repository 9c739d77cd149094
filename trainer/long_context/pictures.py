"""PNG files of what evaluation found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen.trainer.long_context.positions import PositionLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def short_length(tokens: int) -> str:
    """`8K`, `1M`, or the number where it is not a round one."""
    for unit, sign in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{sign}"
    return f"{tokens}"


def draw_heat_map(
    path: Path,
    accuracies: Mapping[int, Mapping[float, float]],
    *,
    title: str,
    trained_length: int | None = None,
) -> None:
    """Accuracy by length (across) and depth (down); a line stands behind the trained length."""
    from matplotlib.figure import Figure

    lengths, depths = sorted(accuracies), sorted(next(iter(accuracies.values())))
    width, height = 2.2 + 0.62 * len(lengths), 1.6 + 0.34 * len(depths)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.add_subplot()
    values = [[accuracies[length][depth] for length in lengths] for depth in depths]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the fact", title=title)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    inside = [length for length in lengths if trained_length and length <= trained_length]
    if inside and len(inside) < len(lengths):
        axes.axvline(len(inside) - 0.5, color="black", linewidth=2)
    figure.colorbar(image, label="answers that are right")
    figure.savefig(path, dpi=150)


def draw_curves(
    path: Path, curves: Mapping[str, PositionLoss], *, title: str, marks: Sequence[int] = ()
) -> None:
    """Loss by position of each source; `marks` are lengths to draw a line at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, curve in curves.items():
        middles = [(a * b) ** 0.5 for a, b in zip(curve.edges, curve.edges[1:], strict=False)]
        axes.plot(middles, curve.losses, marker=".", label=f"{name}, {curve.documents} document(s)")
    for mark in marks:
        axes.axvline(mark, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the document", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
