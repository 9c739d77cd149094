"""Drop rate against capacity factor, with each rank's own capacity and with a shared one.

    python benchmarks/drop_rate.py [plot=docs/drop_rate.png]

Simulated router logits on `RANKS` ranks, in numbers: no process group, but the trainer's own
functions. A logit is the sum of what all tokens share (an expert that the model likes), what one
rank's tokens share (its documents are of one kind) and what a token has to itself, each normal. The
three settings differ in the first two. Prints the table of docs/parallelism.md.
"""

import math
import sys

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fulmen.kernels.moe import route
from fulmen.parallel.router import share_capacity

RANKS, TOKENS, EXPERTS, CHOICES, DRAWS = 8, 4096, 32, 2, 20
FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SETTINGS = {
    "ranks alike": (0.5, 0.0),
    "ranks differ": (0.0, 0.5),
    "both": (0.35, 0.35),
}
"""Standard deviations of what all tokens share and of what one rank's share."""


def draw_counts(shared: float, of_rank: float, generator: torch.Generator) -> Tensor:
    """`[RANKS, EXPERTS]` assignments asked for."""
    normal = torch.randn(EXPERTS, generator=generator)
    counts = []
    for _ in range(RANKS):
        logits = shared * normal + of_rank * torch.randn(EXPERTS, generator=generator)
        logits = logits + torch.randn(TOKENS, EXPERTS, generator=generator)
        counts.append(route(logits, CHOICES).counts)
    return torch.stack(counts)


def drop_rates(counts: Tensor, factor: float) -> tuple[float, float]:
    """With each rank's own capacity, and with the same capacity shared."""
    capacity = math.ceil(factor * TOKENS * CHOICES / EXPERTS)
    capacities = torch.full((RANKS,), capacity)
    local = (counts - capacity).clamp(min=0).sum()
    shared = (counts - share_capacity(counts, capacities)).sum()
    return (local / counts.sum()).item(), (shared / counts.sum()).item()


def measure(shared: float, of_rank: float) -> list[tuple[float, float]]:
    """Both rates by factor, means over the draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [draw_counts(shared, of_rank, generator) for _ in range(DRAWS)]
    rates = torch.tensor([[drop_rates(counts, f) for f in FACTORS] for counts in draws])
    return [(local, together) for local, together in rates.double().mean(0).tolist()]


def plot(results: dict[str, list[tuple[float, float]]], path: str) -> None:
    """One panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(10, 3.2), sharey=True)
    for panel, (name, rates) in zip(panels, results.items(), strict=True):
        for index, label in enumerate(("each rank its own capacity", "capacity shared")):
            values = [100 * pair[index] for pair in rates]
            panel.plot(FACTORS, values, marker="o", markersize=3, label=label)
        panel.set_title(name)
        panel.set_xlabel("moe.capacity_factor")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("dropped assignments, %")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge({"plot": None}, OmegaConf.from_cli(sys.argv[1:]))
    results = {name: measure(*spread) for name, spread in SETTINGS.items()}
    print("| capacity factor | " + " | ".join(f"{name}: own | shared" for name in results) + " |")
    print("|--:|" + "--:|" * (2 * len(results)))
    for index, factor in enumerate(FACTORS):
        cells = [f"{100 * rate:.1f} %" for rates in results.values() for rate in rates[index]]
        print(f"| {factor} | " + " | ".join(cells) + " |")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
