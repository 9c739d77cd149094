"""The stages of a run: which one it is in, and what holds there.

A stage is an entry of `stages`: some keys of the run with other values, a number of tokens, and
shares by source and length. Everything here follows from the configuration and the tokens that the
whole run has trained, so it is the same on every mesh and after every resumption. A stage ends with
the first step that reaches the sum of its own tokens and those of all stages before it: what a last
step trains beyond that is taken from the next stage.

A run without `stages` is one stage made of its own keys.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fulmen.data.buckets import BUCKETS
from fulmen.data.mixture import Shares
from fulmen.trainer.config import (
    RunConfig,
    ScheduleConfig,
    StageConfig,
    check_config,
    nearest_keys,
)
from fulmen.trainer.schedule import batch_sizes, batch_tokens, learning_rate, total_tokens

_OF_THE_RUN = {
    "trainer": ("max_steps", "max_tokens", "micro_batch_tokens", "allow_misfit"),
    "parallel": ("timeout_s", "rendezvous_timeout_s"),
}
"""Keys of mappings that a stage's cannot have."""


@dataclass(frozen=True)
class Stage:
    """One stage with its place in the run."""

    index: int
    name: str
    """Empty in a run without `stages`."""
    start: int
    """Trained tokens of the run from which on it holds."""
    end: int
    """Trained tokens of the run at which it ends."""
    config: RunConfig
    """With the stage's values in place."""

    def learning_rate(self, *, step: int, tokens: int, first_step: int) -> float:
        """Of the step that follows `step` steps and `tokens` tokens of the run.

        `first_step` steps were done before the stage.
        """
        return learning_rate(
            self.config.optim.lr,
            self.config.schedule,
            step=step - first_step,
            tokens=tokens - self.start,
        )

    def batch_tokens(self, tokens: int) -> int:
        """Tokens of the step that follows `tokens` tokens of the run."""
        return batch_tokens(self.config, self.inside(tokens) - self.start)

    def inside(self, tokens: int) -> int:
        """`tokens`, or the last ones of the stage: the loader plans beyond its end."""
        return min(tokens, self.end - 1)


def stage_config(config: RunConfig, index: int) -> RunConfig:
    """The whole configuration of a stage: a copy of the run's with the stage's values in place."""
    if not config.stages:
        return config
    name, stage = list(config.stages.items())[index]
    new = copy.deepcopy(config)
    if stage.objective is not None:
        new.objective = stage.objective
    new.parallel = _merged(new.parallel, stage.parallel, f"stages.{name}.parallel")
    new.trainer = _merged(new.trainer, stage.trainer, f"stages.{name}.trainer")
    new.optim = _merged(new.optim, stage.optim, f"stages.{name}.optim")
    new.preference = _merged(new.preference, stage.preference, f"stages.{name}.preference")
    new.evaluation = _merged(new.evaluation, stage.evaluation, f"stages.{name}.evaluation")
    new.health = _merged(new.health, stage.health, f"stages.{name}.health")
    if stage.seq_len is not None:
        new.data.seq_len = stage.seq_len
    if stage.rope_theta is not None:
        new.model.rope_theta = stage.rope_theta
    if stage.global_batch_tokens is not None:
        new.data.global_batch_tokens = stage.global_batch_tokens
    if stage.micro_batch_tokens is not None:
        new.trainer.micro_batch_tokens = stage.micro_batch_tokens
    if stage.schedule.phases:
        new.schedule = stage.schedule
    return new


def list_stages(config: RunConfig) -> list[Stage]:
    """All stages of a run in their order."""
    if not config.stages:
        return [Stage(0, "", 0, total_tokens(config), config)]
    ends = _ends(config)
    return [
        Stage(index, name, start, end, stage_config(config, index))
        for index, (name, start, end) in enumerate(
            zip(config.stages, [0, *ends], ends, strict=False)
        )
    ]


def run_tokens(config: RunConfig) -> int:
    """Trained tokens at which the run ends, if no step limit ends it before."""
    if not config.stages:
        return total_tokens(config)
    end, limit = _ends(config)[-1], config.trainer.max_tokens
    return end if limit is None else min(end, limit)


def stage_at(config: RunConfig, tokens: int) -> int:
    """Index of the stage of the step that follows `tokens` trained tokens of the run."""
    if not config.stages:
        return 0
    return next(
        (index for index, end in enumerate(_ends(config)) if tokens < end), len(config.stages) - 1
    )


def _ends(config: RunConfig) -> list[int]:
    return list(accumulate(_tokens(config, stage) for stage in config.stages.values()))


def _tokens(config: RunConfig, stage: StageConfig) -> int:
    schedule = stage.schedule if stage.schedule.phases else config.schedule
    return sum(p.tokens for p in schedule.phases) if stage.tokens is None else stage.tokens


def shares_at(config: RunConfig, tokens: int) -> Shares:
    """Shares by source and length of what is drawn after `tokens` trained tokens of the run.

    They sum to 1. From the end of the stage before they go linearly to those of the stage; lengths
    only where both stages have them.
    """
    if not config.stages:
        return Shares(_of_sources(config), None)
    index = stage_at(config, tokens)
    stages = list(config.stages.values())
    stage, done = stages[index], tokens - [0, *_ends(config)][index]
    late = done >= stage.late_from * _tokens(config, stage)
    now = _shares(config, stage, late=late)
    if index == 0 or done >= stage.transition_tokens:
        return now
    before = _shares(config, stages[index - 1], late=True)
    if done == 0:
        return before  # of its sources alone, none may have documents of the new lengths
    part = done / stage.transition_tokens
    lengths = now.lengths
    if lengths is not None and before.lengths is not None:
        lengths = _between(before.lengths, lengths, part)
    return Shares(_between(before.sources, now.sources, part), lengths)


def list_shares(config: RunConfig) -> list[tuple[str, Shares]]:
    """Every stage's name with its shares, and once more with those of its end."""
    return [
        (name, _shares(config, stage, late=late))
        for name, stage in config.stages.items()
        for late in (False, True)
    ]


def drawn_sources(config: RunConfig, index: int) -> set[str]:
    """Sources that a stage can draw documents of."""
    if not config.stages:
        shares = [_of_sources(config)]
    else:
        stages = list(config.stages.values())
        shares = [_shares(config, stages[index], late=late).sources for late in (False, True)]
        if stages[index].transition_tokens:
            shares.append(_shares(config, stages[index - 1], late=True).sources)
    return {name for one in shares for name, share in one.items() if share > 0}


def _shares(config: RunConfig, stage: StageConfig, *, late: bool) -> Shares:
    lengths = None
    if stage.lengths:
        lengths = _normalised({name: stage.lengths.get(name, 0.0) for name in BUCKETS})
    sources = _of_sources(config)
    if stage.weights:
        sources = _normalised({name: stage.weights.get(name, 0.0) for name in sources})
    if late and stage.late_weights:
        fixed = stage.late_weights
        rest = {name: 0.0 if name in fixed else weight for name, weight in sources.items()}
        left = 1 - sum(fixed.values())
        if any(rest.values()):
            rest = {name: left * weight for name, weight in _normalised(rest).items()}
        sources = rest | fixed
    return Shares(sources, lengths)


def _of_sources(config: RunConfig) -> dict[str, float]:
    return _normalised({name: source.weight for name, source in config.data.sources.items()})


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()} if whole else dict(weights)


def _between(old: Mapping[str, float], new: Mapping[str, float], part: float) -> dict[str, float]:
    return {name: (1 - part) * old[name] + part * new[name] for name in new}


def _merged(group: Any, changes: Mapping[str, Any], key: str) -> Any:
    """A configuration group with other values for some keys; `ValueError` for a bad one."""
    for name in changes:
        if name not in {item.name for item in dataclasses.fields(group)}:
            near = nearest_keys(name, type(group))
            hint = f"; did you mean {' or '.join(f'{key}.{one}' for one in near)}?" if near else ""
            raise ValueError(f"unknown key {key}.{name}{hint}")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(group), {name: changes[name]})
            group = OmegaConf.to_object(merged)
        except (OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{key}.{name}: {str(error).splitlines()[0]}") from None
    return group


def check_run(config: RunConfig, world_size: int, *, all_here: bool = False) -> None:
    """Raise `ValueError`, naming the keys, for what can be told to fail before anything runs.

    Of a run with stages, `world_size` processes need only form the mesh of one (`all_here`: of
    all), because a job may end before a stage that needs others; but each has to be possible.
    """
    if not config.stages:
        _check_values(config, world_size)
        return
    for name in config.stages:
        _check_stage(config, name)
    faults = [fault_of(stage, world_size) for stage in list_stages(config)]
    if all(faults) or (all_here and any(faults)):
        raise ValueError(next(fault for fault in faults if fault))
    for stage, fault in zip(list_stages(config), faults, strict=True):
        if fault:
            _check_possible(stage)


def fault_of(stage: Stage, world_size: int) -> str | None:
    """Why `world_size` processes cannot run a stage, or None if they can."""
    try:
        _check_values(stage.config, world_size)
    except ValueError as error:
        return f"stages.{stage.name}: {error}" if stage.name else str(error)
    return None


def _check_values(config: RunConfig, world_size: int) -> None:
    check_config(config, world_size)
    # Builds the model, and torch takes seconds to import; what is above is told before that.
    from fulmen.trainer.memory import list_settings

    list_settings(config)


def _check_possible(stage: Stage) -> None:
    """Whether any number of processes can run a stage."""
    parallel = stage.config.parallel
    if min(parallel.cp, parallel.ep, parallel.etp) < 1:
        smallest = most = 1
    else:
        smallest = math.lcm(parallel.cp, parallel.ep * parallel.etp)
        # Each data-parallel rank has at least one micro-batch.
        rows = stage.config.data.global_batch_tokens // max(
            1, stage.config.trainer.micro_batch_tokens
        )
        most = max(1, rows * parallel.cp // smallest)
    faults = (fault_of(stage, smallest * times) for times in range(1, most + 1))
    first = next(faults)
    if first is not None and all(faults):
        raise ValueError(first)


def _check_stage(config: RunConfig, name: str) -> None:
    """What a stage has beyond the keys of a run."""
    key, stage = f"stages.{name}", config.stages[name]
    last = list(config.stages.values())[-1]
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise ValueError(f"{key}: a stage's name is letters, digits, _ and -, a letter first")
    for group, names in _OF_THE_RUN.items():
        for own in names:
            if own in getattr(stage, group):
                raise ValueError(f"{key}.{group}.{own}: not a key of a stage's {group}")
    if not stage.schedule.phases and stage.schedule != ScheduleConfig():
        raise ValueError(f"{key}.schedule has no phases: give them too")
    sources = tuple(config.data.sources)
    _check_shares(f"{key}.lengths", stage.lengths, BUCKETS)
    _check_shares(f"{key}.weights", stage.weights, sources)
    _check_shares(f"{key}.late_weights", stage.late_weights, sources)
    _check_late(config, key, stage)
    tokens = _tokens(config, stage)
    place = list(config.stages).index(name)
    merged = stage_config(config, place)
    patience = merged.preference.patience
    if merged.objective == "preference" and patience is not None and stage is not last:
        raise ValueError(
            f"{key}.preference.patience={patience}: only a run's last stage can end early, for "
            "the others begin after given tokens; set it to null there"
        )
    largest = max(
        size
        for index in range(max(0, place - 1), place + 1)
        for size in batch_sizes(stage_config(config, index))
    )
    if tokens < largest:
        raise ValueError(
            f"{key}.tokens={tokens}: must be at least a step's tokens, here and in the stage "
            f"before: {largest}"
        )
    longest = int(stage.late_from * tokens) if stage.late_weights else tokens
    if not 0 <= stage.transition_tokens <= longest:
        raise ValueError(
            f"{key}.transition_tokens={stage.transition_tokens}: must be between 0 and {longest}, "
            "the tokens of the stage (before late_weights hold)"
        )
    if place == 0 and stage.transition_tokens:
        raise ValueError(f"{key}.transition_tokens: the first stage has nothing to come from")


def _check_late(config: RunConfig, key: str, stage: StageConfig) -> None:
    if not 0 < stage.late_from < 1:
        raise ValueError(f"{key}.late_from={stage.late_from}: must be between 0 and 1")
    late = sum(stage.late_weights.values())
    usual = _shares(config, stage, late=False).sources
    others = any(weight for name, weight in usual.items() if name not in stage.late_weights)
    if late > 1 or (stage.late_weights and not others and not math.isclose(late, 1)):
        raise ValueError(
            f"{key}.late_weights are shares of all tokens, {late:g} together: they must be at most "
            "1, and 1 where no other source has a weight"
        )


def _check_shares(key: str, shares: Mapping[str, float], known: tuple[str, ...]) -> None:
    for name, share in shares.items():
        if name not in known:
            raise ValueError(f"unknown key {key}.{name}; known are {', '.join(known)}")
        if not (share >= 0 and math.isfinite(share)):
            raise ValueError(f"{key}.{name}={share}: must be a number of 0 or more")
    if shares and not sum(shares.values()):
        raise ValueError(f"{key}: at least one share must be above 0")
