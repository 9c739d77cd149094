"""Where a run begins or goes on: its checkpoint, and by that its stage."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulmen.trainer.checkpoint import STATE_FILE, Checkpointer
from fulmen.trainer.config import RunConfig
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.run_log import log
from fulmen.trainer.stages import Stage, list_stages, stage_at, stage_config


@dataclass(frozen=True)
class Start:
    """What a trainer begins with."""

    checkpoint: Path | None
    """None = initial weights."""
    stage: Stage
    first_step: int
    """Steps of the run before the stage."""
    origin: RunConfig
    """The configuration that the checkpoint should have been trained with."""


def find_start(config: RunConfig, checkpointer: Checkpointer) -> Start:
    """What `checkpoint.resume` and the run's own checkpoints say; every rank calls it."""
    stages = list_stages(config)
    path = _choose(config, checkpointer)
    state = {} if path is None else _state(path)
    if not state:
        return Start(path, stages[0], 0, stages[0].config)
    stage = stages[stage_at(config, state["tokens"])]
    # Of a run without stages, or from before there were any, nothing is known but its step.
    known = state.get("stage", {"name": "", "first_step": 0, "ended": False})
    origin = config
    if known["name"] in config.stages:
        origin = stage_config(config, list(config.stages).index(known["name"]))
    if known["name"] == stage.name or stage.index == 0:
        first_step = known["first_step"] if known["name"] == stage.name else 0
        return Start(path, stage, first_step, origin)
    if not known["ended"]:
        log.warning(
            "%s is from within stage %s, but by its %d tokens stage %s begins: stages.*.tokens "
            "have changed, or there were no stages",
            path,
            known["name"] or "(none)",
            state["tokens"],
            stage.name,
        )
    return Start(path, stage, state["step"], origin)


def _state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint; empty for imported weights."""
    file = path / STATE_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def _choose(config: RunConfig, checkpointer: Checkpointer) -> Path | None:
    resume, own = config.checkpoint.resume, checkpointer.find_newest()
    if resume == "auto":
        return own
    if resume == "never":
        if own is not None:
            raise ValueError(
                f"checkpoint.resume=never, but this run already has {own}: choose another "
                "run_id, so that nothing is overwritten"
            )
        return None
    if own is not None:
        # A requeued job repeats its command line; it must not fall back to where it began.
        log.info("checkpoint.resume=%s is where this run began; it goes on from %s", resume, own)
        return own
    path = Path(resume)
    fault = checkpointer.find_fault(path)
    if fault is not None:
        raise CheckpointError(f"checkpoint.resume={resume}: {fault}")
    return path
