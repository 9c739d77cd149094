"""Other meshes for a plan: the smallest change with which a stage fits, and the fastest that do."""

import copy
import dataclasses
import itertools
import math
from typing import Any

from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.memory import GIB, list_units
from fulmen.trainer.planner import (
    Assumptions,
    Gpu,
    StagePlan,
    plan_stage,
    predict_memory,
    predict_step,
)
from fulmen.trainer.stages import Stage

CHUNK_TOKENS = 65_536
"""Suggested as trainer.chunk_tokens: large enough for the products, small beside a long row."""
Change = tuple[str, Any]


def changed(config: RunConfig, changes: list[Change]) -> RunConfig:
    """A copy with these `group.key` values."""
    new = copy.deepcopy(config)
    for key, value in changes:
        group, name = key.split(".")
        setattr(getattr(new, group), name, value)
    return new


def _is_valid(config: RunConfig, gpus: int) -> bool:
    try:
        check_config(config, gpus)
        list_units(config, gpus)
    except ValueError:
        return False
    return True


def suggest(config: RunConfig, gpus: int, usable_gib: float) -> list[Change] | None:
    """The fewest changes, and of those the first in this order, with which the run fits."""
    parallel, trainer = config.parallel, config.trainer
    cps = [("parallel.cp", cp) for cp in _context_sizes(config)[1:]]
    dims: list[list[Change | None]] = [
        [None, *(("parallel.ep", ep) for ep in _divisors(config.model.num_experts))],
        [None, *(("trainer.activation_checkpointing", name) for name in ("selective", "full"))],
        [None, ("trainer.chunk_tokens", CHUNK_TOKENS)],
        [None, ("trainer.offload_checkpoints", True)],
        [None, ("parallel.zero_stage", 3)],
        [None, *(("trainer.micro_batch_tokens", n * config.data.seq_len) for n in (4, 2, 1))],
        [None, *cps],
    ]
    now = {
        "parallel.ep": parallel.ep,
        "parallel.zero_stage": parallel.zero_stage,
        "parallel.cp": parallel.cp,
        "trainer.activation_checkpointing": trainer.activation_checkpointing,
        "trainer.chunk_tokens": trainer.chunk_tokens or CHUNK_TOKENS + 1,
        "trainer.offload_checkpoints": trainer.offload_checkpoints,
        "trainer.micro_batch_tokens": trainer.micro_batch_tokens,
    }
    choices = []
    for picked in itertools.product(*reversed(dims)):  # the first varies fastest
        changes = [change for change in reversed(picked) if change is not None]
        grows = any(key.startswith("parallel.") and value < now[key] for key, value in changes)
        smaller = all(
            value < now[key] for key, value in changes if key == "trainer.micro_batch_tokens"
        )
        if smaller and not grows and all(now[key] != value for key, value in changes):
            choices.append(changes)
    for changes in sorted(choices, key=len):
        candidate = changed(config, changes)
        if not _is_valid(candidate, gpus):
            continue
        if sum(predict_memory(candidate, gpus).values()) / GIB <= usable_gib:
            return changes
    return None


def _context_sizes(config: RunConfig) -> list[int]:
    """Values of cp worth a try: a rank's part of a row stays 4096 tokens long, up to cp 8 less."""
    most = max(8, config.data.seq_len // 4096)
    return [2**power for power in range(most.bit_length())]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def search(stage: Stage, gpus: int, gpu: Gpu, assume: Assumptions) -> list[StagePlan]:
    """The five fastest plans of a stage that fit, over meshes and ZeRO stages of this many GPUs,
    by their first steps."""
    config = stage.config
    found: list[tuple[float, float, RunConfig]] = []
    for cp, ep, etp, dense, experts in itertools.product(
        _context_sizes(config),
        _divisors(config.model.num_experts),
        (1, 2, 4, 8),
        (1, 2, 3),
        (1, 2, 3),
    ):
        changes: list[Change] = [("parallel.cp", cp), ("parallel.ep", ep), ("parallel.etp", etp)]
        changes += [("parallel.zero_stage", dense), ("parallel.expert_zero_stage", experts)]
        candidate = changed(config, changes)
        if not _is_valid(candidate, gpus):
            continue
        if sum(predict_memory(candidate, gpus).values()) / GIB > gpu.usable_gib:
            continue
        batch = config.data.global_batch_tokens
        step = predict_step(candidate, gpus, gpu, assume, batch)
        # Where the host is the limit, those with least else to wait for come first.
        rest = sum(step.work_s.values()) + sum(step.exchange_s.values())
        found.append((step.seconds, rest, candidate))
    fastest = sorted(found, key=lambda one: one[:2])[:5]
    tokens = stage.end - stage.start
    return [
        plan_stage(
            dataclasses.replace(stage, config=candidate),
            gpus,
            gpu,
            assume,
            tokens=tokens,
            steps=config.trainer.max_steps or math.inf,
        )
        for *_, candidate in fastest
    ]
