"""Where a run begins or goes on: its checkpoint, and by that its stage.

A run goes on from its own newest checkpoint, or from another run's, in that one's stage and step.
It begins anew, at step 0 with new moments, where there is none, and where another run's gives
weights alone: those of an import, of a text model, to which a tower is to be added, or of the end
of a stage that this run does not have.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fulmen.trainer.checkpoint import STATE_FILE, Checkpointer
from fulmen.trainer.config import RunConfig
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.memory import frozen_of
from fulmen.trainer.run_log import log
from fulmen.trainer.stages import Stage, list_stages, stage_at, stage_config
from fulmen.trainer.weights import PREFIX, check_same_model, load_model_config

TOWER = "vision_tower."
EYES = (TOWER, "multi_modal_projector.", "image_newline")
"""Beginnings of the names of what a VL model has and its text model has not."""


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
    anew: bool = False
    """At step 0: of a checkpoint the weights alone are taken."""
    tower: Path | None = None
    """Where the vision tower comes from, if not from the checkpoint."""


def find_start(config: RunConfig, checkpointer: Checkpointer, *, is_first: bool = True) -> Start:
    """What `checkpoint` and the run's own checkpoints say; every rank calls it.

    Where it `is_first` in this job there may have to be none of its own.
    """
    stages = list_stages(config)
    path, is_own = _choose(config, checkpointer, is_first)
    state = {} if path is None else _state(path)
    # Of a run without stages, or from before there were any, nothing is known but its step.
    known = state.get("stage", {"name": "", "first_step": 0, "ended": False})
    begun = Start(path, stages[0], 0, stages[0].config)
    if not is_own:
        tower = _find_tower(config, checkpointer)
        elsewhere = known["ended"] and known["name"] not in config.stages
        if not state or elsewhere or _lacks_eyes(path, config):
            return dataclasses.replace(begun, anew=True, tower=tower)
        if tower is not None:
            raise ValueError(
                f"checkpoint.tower={tower}: the run goes on from step {state['step']} of {path}, "
                "which has a tower; a tower is taken where a run begins"
            )
    stage = stages[stage_at(config, state["tokens"])]
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


def load_first_weights(
    start: Start, checkpointer: Checkpointer, weights: Mapping[str, Tensor]
) -> None:
    """Fill `model.*` tensors in place with what a run that begins anew takes from checkpoints.

    A text model's may lack what only a VL model has: that keeps its initial values, or comes from
    `checkpoint.tower`. Anything else that is missing, left over or of another shape is an error.
    """
    wanted, initial = dict(weights), set[str]()
    if start.tower is not None:
        # Of a tower's own pretraining; its captioner is left.
        tower = {name: wanted.pop(name) for name in weights if name.startswith(PREFIX + TOWER)}
        checkpointer.load_some(start.tower, tower)
        log.info("vision tower: %d tensors of %s", len(tower), start.tower)
    if start.checkpoint is None:
        initial = set(wanted)
    else:
        model = start.stage.config.model
        if _lacks_eyes(start.checkpoint, start.stage.config):
            model = dataclasses.replace(model, vision=None)
            initial = {name for name in wanted if name.startswith(tuple(PREFIX + e for e in EYES))}
        check_same_model(start.checkpoint, model)
        left = (PREFIX + TOWER,) if start.tower is not None else ()
        known = {name: wanted[name] for name in wanted if name not in initial}
        checkpointer.load_some(start.checkpoint, known, spare=left, all_of_it=True)
        log.info("starting at step 0 from the weights of %s", start.checkpoint)
    if len(initial) < len(weights):
        for part, count in sorted(Counter(name.split(".")[1] for name in initial).items()):
            log.info("%s: %d tensors have their initial values", part, count)
    frozen = [name for name in frozen_of(start.stage.config) if PREFIX + name in initial]
    if frozen:
        log.warning(
            "%d parameters that are frozen have initial values, the first is %s: is a checkpoint "
            "missing (checkpoint.resume, checkpoint.tower)?",
            len(frozen),
            min(frozen),
        )


def _lacks_eyes(path: Path | None, config: RunConfig) -> bool:
    if path is None:
        return False
    return config.model.vision is not None and load_model_config(path).vision is None


def _find_tower(config: RunConfig, checkpointer: Checkpointer) -> Path | None:
    if config.checkpoint.tower is None:
        return None
    path, key = Path(config.checkpoint.tower), f"checkpoint.tower={config.checkpoint.tower}"
    fault = checkpointer.find_fault(path)
    if fault is not None:
        raise CheckpointError(f"{key}: {fault}")
    theirs, ours = load_model_config(path).vision, config.model.vision
    if theirs is None or ours is None:
        lacks = path if theirs is None else "this run's model"
        raise CheckpointError(f"{key}: {lacks} has no vision tower")
    for name in (
        "num_layers", "hidden_size", "num_attention_heads", "mlp_hidden_size", "patch_size",
        "layer_norm_eps", "tile_size",
    ):  # fmt: skip
        there, here = getattr(theirs, name), getattr(ours, name)
        if there != here:
            hint = "; launch/resize_tower.py fits it" if name == "tile_size" else ""
            raise CheckpointError(f"{key}: model.vision.{name} is {there} there, {here} here{hint}")
    return path


def _state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint; empty for imported weights."""
    file = path / STATE_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def _choose(
    config: RunConfig, checkpointer: Checkpointer, is_first: bool
) -> tuple[Path | None, bool]:
    """The checkpoint, if there is one, and whether it is one of this run."""
    resume, own = config.checkpoint.resume, checkpointer.find_newest()
    if resume == "never" and own is not None and is_first:
        raise ValueError(
            f"checkpoint.resume=never, but this run already has {own}: choose another "
            "run_id, so that nothing is overwritten"
        )
    if resume in ("auto", "never") or own is not None:
        if resume not in ("auto", "never"):
            # A requeued job repeats its command line; it must not fall back to where it began.
            log.info(
                "checkpoint.resume=%s is where this run began; it goes on from %s", resume, own
            )
        return own, own is not None
    path = Path(resume)
    fault = checkpointer.find_fault(path)
    if fault is not None:
        raise CheckpointError(f"checkpoint.resume={resume}: {fault}")
    return path, False
