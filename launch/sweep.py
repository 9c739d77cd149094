"""Points of a sweep: `slurm.sweep={optim.lr: [1e-3, 3e-4], seed: [0, 1]}` is four runs."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose

from fulmen.launch.hydra_main import open_mappings

LONGEST_NAME = 150
"""Of a point, which is part of a folder's name."""


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    name: str
    """Readable, and part of the run's id: lr_0.001-seed_0."""
    words: tuple[str, ...]
    """Overrides, which come after all others."""


def list_points(sweep: Mapping[str, Any], given: Sequence[str], own_keys: str) -> list[Point]:
    """All points, the last key's values changing fastest; `ValueError` that names the key.

    Args:
        sweep: lists of plain values by key.
        given: overrides of the command line.
        own_keys: regular expression of overrides that are the submission's, not the run's.
    """
    for key, values in sweep.items():
        if re.match(own_keys, f"{key}="):
            raise ValueError(f"slurm.sweep: {key} is not a key of the run, which alone can differ")
        if any(re.match(rf"[+~]*{re.escape(key)}=", word) for word in given):
            raise ValueError(f"{key} is given as well as slurm.sweep.{key}: take one of them out")
        if not isinstance(values, list) or not values:
            raise ValueError(f"slurm.sweep.{key}={values}: must be a list of values")
        for value in values:
            if isinstance(value, list | dict):
                raise ValueError(f"slurm.sweep.{key}: {value} is no number, text, truth or null")
    ends = Counter(key.rpartition(".")[2] for key in sweep)
    points = []
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        names = []
        for key, value in chosen.items():
            end = key.rpartition(".")[2]
            names.append(f"{end if ends[end] == 1 else key}_{_text(value)}")
        name = re.sub(r"[^\w.+-]+", "_", "-".join(names))
        words = tuple(open_mappings(f"{key}={_quoted(value)}") for key, value in chosen.items())
        points.append(Point(name, words))
    counts = Counter(point.name for point in points)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"slurm.sweep: {count} runs would be called {name}: is a value there twice?"
        )
    if len(name := max(counts, key=len)) > LONGEST_NAME:
        raise ValueError(f"slurm.sweep: {name} is too long for a folder's name")
    return points


def compose_point(point: Point, given: Sequence[str]) -> Any:
    """The composed configuration of `recipes/submit.yaml` at a point; within Hydra's main."""
    return compose("submit", overrides=[*given, *point.words])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(value: Any) -> str:
    """As a value of a Hydra override; a plain word may also be the name of a group's file."""
    text = _text(value)
    plain = not isinstance(value, str) or re.fullmatch(r"[A-Za-z_][\w./-]*", value)
    return text if plain and text not in ("null", "true", "false") else json.dumps(value)
