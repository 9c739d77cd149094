"""Scaling laws from finished runs: what a budget of compute is best spent on, and its loss.

A run's curve gives the loss L after D tokens, and so after C = D x (operations a token). For a grid
of C, the sizes of a kind (softmax, lightning, hybrid) that were trained for so long are compared; a
parabola in log N through the best one and its two neighbours has its lowest point at the optimal
size N(C) with the loss L(C), and D(C) = C / (operations a token at that size). Where the best size
is the smallest or the largest, the optimum may lie outside, and that C is left out. Straight lines
in log-log space through what remains are the laws of MiniMax-01 (arXiv:2501.08313, table 2).

With a fixed learning rate each point of a curve is the end of a shorter run. Of a run whose
learning rate changes only the end counts; then several lengths of each size are needed.

N leaves out embedding and head, as the paper's 12 l d^2 does. C is counted twice: `ours` by
trainer/flops.py, with the head, causal attention by documents, lightning attention by its
recurrence; `paper` by table 1, without the head, attention in full over whole rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from fulmen.models.config import ModelConfig
from fulmen.trainer.flops import training_flops
from fulmen.trainer.manifest import CONFIG_FILE
from fulmen.trainer.memory import count_model
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.run_folder import DONE
from fulmen.trainer.scaling_joint import fit_joint
from fulmen.trainer.weights import load_model_config

Array = NDArray[np.float64]

PFLOP_S_DAY = 1e15 * 86_400
"""Operations of one PFLOP/s-day, the unit of C."""
COUNTS = ("ours", "paper")
LAWS = ("loss", "parameters", "tokens")
MIN_SIZES = 3
"""Of a kind: the parabola's points."""
MIN_OPTIMA = 3
"""Points of a law."""
_BINS_PER_DOUBLING = 4
_GRID_PER_DECADE = 20
_END = 0.98
"""Of a run whose learning rate changes, the mean over the rows from this part of its tokens on."""


@dataclass(frozen=True)
class Law:
    """`coefficient * C ** exponent`, C in PFLOP/s-days."""

    coefficient: float
    exponent: float

    def at(self, compute: Array) -> Array:
        """Its values."""
        return self.coefficient * compute**self.exponent


PAPER: dict[str, dict[str, Law]] = {
    "softmax": {
        "loss": Law(3.7087, -0.0798),
        "parameters": Law(1.82e8, 0.7118),
        "tokens": Law(2.56e10, 0.5102),
    },
    "lightning": {
        "loss": Law(3.5391, -0.0768),
        "parameters": Law(2.74e8, 0.6470),
        "tokens": Law(4.43e10, 0.4684),
    },
    "hybrid": {
        "loss": Law(3.4797, -0.0763),
        "parameters": Law(2.57e8, 0.6670),
        "tokens": Law(3.70e10, 0.4707),
    },
}
"""The published fits (table 2)."""


def kind_of(model: ModelConfig) -> str:
    """softmax, lightning, or hybrid with the paper's one softmax layer in eight."""
    if model.softmax_every == 1:
        return "softmax"
    if model.num_softmax_layers == 0:
        return "lightning"
    return "hybrid" if model.softmax_every == 8 else f"hybrid_{model.softmax_every}"


def paper_parameters(model: ModelConfig) -> float:
    """Table 1: 12 l d^2, and 2 d^2 / h for each lightning layer."""
    lightning = model.num_layers - model.num_softmax_layers
    gates = 2 * lightning / model.num_attention_heads
    return (12 * model.num_layers + gates) * model.hidden_size**2


def paper_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Table 1: 72 l d^2 (1 + s n / 6d + (1 - s) / 2h + 5 / 18d), s the share of softmax layers."""
    share = model.num_softmax_layers / model.num_layers
    width = model.hidden_size
    attention = share * seq_len / (6 * width) + (1 - share) / (2 * model.num_attention_heads)
    return 72 * model.num_layers * width**2 * (1 + attention + 5 / (18 * width))


@dataclass(frozen=True)
class Run:
    """The points of a finished run that stand for the end of a training."""

    path: Path
    kind: str
    parameters: int
    """That one token passes through, without embedding and head."""
    flops_per_token: dict[str, float]
    """By count; without `paper` where the model is not dense."""
    tokens: Array
    losses: Array
    comparable: dict[str, Any]
    """What must be equal for losses to be compared."""


def read_run(path: Path, metric: str) -> Run:
    """Read a finished run; `ValueError` says what is wrong with it."""
    for name in (DONE, CONFIG_FILE, "metrics.jsonl"):
        if not (path / name).is_file():
            reason = "it has not come to its end" if name == DONE else "it is no run's folder"
            raise ValueError(f"{path}: no {name}: {reason}")
    config, model = load_run_config(path), load_model_config(path)
    seq_len = OmegaConf.select(config, "data.seq_len")
    schedule = OmegaConf.select(config, "schedule")
    if seq_len is None or schedule is None:
        raise ValueError(f"{path / CONFIG_FILE} has no data.seq_len or no schedule: it is no run's")
    # A skipped step's loss is of a bad batch, and no point of the curve.
    rows = [row for row in read_metrics(path / "metrics.jsonl") if not row.get("skipped")]
    for row in rows:
        for key in {"loss", metric} & row.keys():
            if not isinstance(row[key], int | float) or not math.isfinite(row[key]):
                raise ValueError(f"{path}: {key} of step {row['step']} is {row[key]}")
    points = [row for row in rows if metric in row and row["step"] > schedule.warmup_steps]
    if not points:
        known = sorted({key for row in rows for key in row if "loss" in key})
        raise ValueError(
            f"{path}: no {metric} behind the {schedule.warmup_steps} steps of warm-up; its rows "
            f"have {', '.join(known) or 'no loss'}"
        )
    tokens = np.array([row["tokens"] for row in points], float)
    losses = np.array([row[metric] for row in points], float)
    if len({phase.lr_factor for phase in schedule.phases}) > 1:
        losses = losses[tokens >= _END * tokens[-1]].mean(keepdims=True)
        tokens = tokens[-1:]
    flops = {"ours": _logged_flops(rows) or _row_flops(model, seq_len)}
    if model.num_experts == 1:
        flops["paper"] = paper_flops_per_token(model, seq_len)
    return Run(
        path=path,
        kind=kind_of(model),
        parameters=count_model(model).active,
        flops_per_token=flops,
        tokens=tokens,
        losses=losses,
        comparable={
            "model.vocab_size": model.vocab_size,
            "model.num_experts": model.num_experts,
            "data.seq_len": seq_len,
        },
    )


def _logged_flops(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean over the tokens of the run, or None if no row has it."""
    total, before = 0.0, 0
    for row in rows:
        if "flops_per_token" in row:
            total += row["flops_per_token"] * (row["tokens"] - before)
            before = row["tokens"]
    return total / before if before else None


def _row_flops(model: ModelConfig, seq_len: int) -> float:
    """As if one document filled each row."""
    flops = training_flops(
        model,
        num_tokens=seq_len,
        sum_squared_lengths=seq_len**2,
        num_assignments=seq_len * model.num_layers * model.num_experts_per_token,
    )
    return flops / seq_len


def read_runs(paths: Sequence[Path], metric: str) -> dict[str, list[Run]]:
    """Finished runs by kind; one `ValueError` with everything that is wrong."""
    runs, faults = [], []
    for path in paths:
        try:
            runs.append(read_run(path, metric))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("runs: " + "\n  ".join(faults))
    if not runs:
        raise ValueError("runs is empty: name the folders of finished runs")
    for run in runs[1:]:
        for key, value in run.comparable.items():
            first = runs[0].comparable[key]
            if value != first:
                raise ValueError(
                    f"runs: {key} is {first} in {runs[0].path} and {value} in {run.path}: their "
                    "losses cannot be compared"
                )
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    for kind, members in kinds.items():
        sizes = sorted({run.parameters for run in members})
        if len(sizes) < MIN_SIZES:
            raise ValueError(
                f"runs: {len(sizes)} size(s) of kind {kind} ({', '.join(map(str, sizes))} "
                f"parameters): a fit needs {MIN_SIZES} or more"
            )
    return kinds


@dataclass(frozen=True)
class Curve:
    """The loss of one size after so many tokens: means over bins, from all its runs."""

    parameters: int
    flops_per_token: dict[str, float]
    tokens: Array
    losses: Array


def curves(runs: Sequence[Run], rng: np.random.Generator | None = None) -> list[Curve]:
    """A curve a size, small sizes first; with `rng` each row is drawn anew from its bin."""
    by_size: dict[int, list[Run]] = {}
    for run in runs:
        by_size.setdefault(run.parameters, []).append(run)
    made = []
    for parameters, members in sorted(by_size.items()):
        tokens = np.concatenate([run.tokens for run in members])
        losses = np.concatenate([run.losses for run in members])
        order = np.argsort(tokens, kind="stable")
        tokens, losses = tokens[order], losses[order]
        bins = np.floor(_BINS_PER_DOUBLING * np.log2(tokens)).astype(int)
        _, start, count = np.unique(bins, return_index=True, return_counts=True)
        if rng is not None:
            each = np.repeat(np.arange(len(count)), count)
            drawn = start[each] + (rng.random(len(each)) * count[each]).astype(int)
            tokens, losses = tokens[drawn], losses[drawn]
        made.append(
            Curve(
                parameters,
                {
                    count: float(np.mean([run.flops_per_token[count] for run in members]))
                    for count in members[0].flops_per_token
                },
                np.exp(np.add.reduceat(np.log(tokens), start) / count),
                np.add.reduceat(losses, start) / count,
            )
        )
    return made


@dataclass(frozen=True)
class Frontier:
    """What each compute, in PFLOP/s-days, is best spent on; arrays of one length."""

    compute: Array
    loss: Array
    parameters: Array
    tokens: Array


def frontier(sizes: Sequence[Curve], count: str) -> Frontier:
    """The optima inside the sizes, on a grid of computes."""
    log_n = np.log([size.parameters for size in sizes])
    log_f = np.log([size.flops_per_token[count] for size in sizes])
    spent = [np.log(size.tokens) + f for size, f in zip(sizes, log_f, strict=True)]
    lowest, highest = min(s[0] for s in spent), max(s[-1] for s in spent)
    number = int((highest - lowest) / math.log(10) * _GRID_PER_DECADE) + 2
    grid = np.linspace(lowest, highest, number)
    table = [
        np.interp(grid, c, np.log(size.losses), left=np.inf, right=np.inf)
        for c, size in zip(spent, sizes, strict=True)
    ]
    found = []
    for log_c, losses in zip(grid, np.stack(table, 1), strict=True):
        there = np.flatnonzero(np.isfinite(losses))
        best = int(np.argmin(losses[there])) if len(there) else 0
        if not 0 < best < len(there) - 1:
            continue
        near = there[best - 1 : best + 2]
        n, loss = _vertex(log_n[near], losses[near])
        found.append((log_c, loss, n, log_c - np.interp(n, log_n, log_f)))
    columns = np.exp(np.array(found, float).reshape(-1, 4)).T
    return Frontier(columns[0] / PFLOP_S_DAY, *columns[1:])


def _vertex(x: Array, y: Array) -> tuple[float, float]:
    """The lowest point of the parabola through three points, the middle one the lowest."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature == 0.0:  # three equal losses
        return float(x[1]), float(y[1])
    slope = left + curvature * (x[1] - x[0])  # at the middle point
    return float(x[1] - slope / (2 * curvature)), float(y[1] - slope**2 / (4 * curvature))


def fit_law(compute: Array, values: Array) -> Law:
    """Least squares in log-log space."""
    design = np.stack([np.ones_like(compute), np.log(compute)], 1)
    solution = np.linalg.lstsq(design, np.log(values), rcond=None)[0]
    return Law(float(np.exp(solution[0])), float(solution[1]))


def fit_laws(optima: Frontier) -> dict[str, Law]:
    """The three laws; `ValueError` if there are too few optima."""
    if len(optima.compute) < MIN_OPTIMA:
        raise ValueError(
            f"at {len(optima.compute)} compute(s) does the best size lie between a smaller and a "
            f"larger one, and {MIN_OPTIMA} are needed: train smaller sizes for longer, or larger "
            "ones, so that their computes overlap"
        )
    return {name: fit_law(optima.compute, getattr(optima, name)) for name in LAWS}


def bootstrap(
    runs: Sequence[Run], count: str, *, samples: int, seed: int
) -> tuple[dict[str, dict[str, list[float]]] | None, int]:
    """90 % intervals of the laws' numbers, or None, and how many of the draws could be fitted.

    A draw takes as many runs with replacement, and of each run's bins as many rows; draws that
    lack sizes have no fit and are left out. No intervals where that is more than half of them.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        some = [runs[index] for index in rng.integers(len(runs), size=len(runs))]
        try:
            drawn.append(fit_laws(frontier(curves(some, rng), count)))
        except ValueError:
            continue
    if 2 * len(drawn) < samples or not drawn:
        return None, len(drawn)
    intervals = {
        name: {
            key: np.quantile([getattr(laws[name], key) for laws in drawn], [0.05, 0.95]).tolist()
            for key in ("coefficient", "exponent")
        }
        for name in LAWS
    }
    return intervals, len(drawn)


def fit_kind(kind: str, runs: Sequence[Run], *, samples: int, seed: int) -> dict[str, Any]:
    """Everything that is fitted to the runs of a kind, as JSON; `unfitted` says why a count is not.

    `ValueError` if neither count gives a fit.
    """
    sizes = curves(runs)
    fits, unfitted = {}, {}
    for count in COUNTS:
        if count not in sizes[0].flops_per_token:
            unfitted[count] = "the paper counts dense models, and these have several experts"
            continue
        optima = frontier(sizes, count)
        try:
            laws = fit_laws(optima)
        except ValueError as error:
            unfitted[count] = str(error)
            continue
        intervals, fitted = bootstrap(runs, count, samples=samples, seed=seed)
        fits[count] = {
            "laws": {name: asdict(law) for name, law in laws.items()},
            "intervals_90": intervals,
            "bootstrap": {"draws": samples, "fitted": fitted},
            "frontier": {name: column.tolist() for name, column in vars(optima).items()},
        }
    if not fits:
        raise ValueError(f"runs of kind {kind}: {unfitted['ours']}")
    return {
        "runs": [str(run.path) for run in runs],
        "sizes": [
            {
                "parameters": size.parameters,
                "flops_per_token": size.flops_per_token,
                "tokens": size.tokens.tolist(),
                "losses": size.losses.tolist(),
            }
            for size in sizes
        ],
        "fits": fits,
        "unfitted": unfitted,
        "joint": fit_joint(
            np.concatenate([np.full(len(size.tokens), float(size.parameters)) for size in sizes]),
            np.concatenate([size.tokens for size in sizes]),
            np.concatenate([size.losses for size in sizes]),
        ),
        "paper": {name: asdict(law) for name, law in PAPER[kind].items()}
        if kind in PAPER
        else None,
    }
