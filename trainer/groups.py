"""Which parameters train, and how: the groups of `optim.groups` by parameter."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fulmen.trainer.config import OptimConfig


@dataclass(frozen=True)
class Settings:
    """How one parameter trains."""

    group: str = ""
    """Its group's name; empty where no group matches."""
    lr_factor: float = 1.0
    weight_decay: float | None = None
    """None = `optim.weight_decay`."""
    frozen: bool = False


def resolve_groups(config: OptimConfig, names: Collection[str]) -> dict[str, Settings]:
    """Name of each parameter -> how it trains.

    The first group whose `match` fits counts. `ValueError` for a group that fits no parameter at
    all, and if nothing is left to train.
    """
    for group, values in config.groups.items():
        if not any(re.match(values.match, name) for name in names):
            raise ValueError(
                f"optim.groups.{group}.match={values.match}: the name of no parameter begins like "
                f"this; names are such as {_examples(names)}"
            )
    settings = {name: _settings_of(config, name) for name in names}
    if all(one.frozen for one in settings.values()):
        raise ValueError(
            f"optim.groups: {', '.join(config.groups)} freeze every parameter, so nothing trains: "
            "set frozen=false in one of them"
        )
    return settings


def _settings_of(config: OptimConfig, name: str) -> Settings:
    for group, values in config.groups.items():
        if re.match(values.match, name):
            return Settings(group, values.lr_factor, values.weight_decay, values.frozen)
    return Settings()


def _examples(names: Iterable[str]) -> str:
    """One name of each layout, with a star for layers' numbers."""
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(list(kinds)[:4])
