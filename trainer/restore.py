"""What a run trains, by name, as checkpoints have it; and taking it back from one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.parallel.zero import ZeroEngine, local_part
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.optim import MOMENTS, Optimizer
from fulmen.trainer.run_log import log
from fulmen.trainer.weights import PREFIX


def trained_tensors(engine: ZeroEngine, optimizer: Optimizer) -> dict[str, DTensor]:
    """Weights as `model.<parameter>` and moments, sharded as they are; they share memory."""
    weights = {PREFIX + name: cast(DTensor, p.detach()) for name, p in engine.parameters.items()}
    return weights | dict(optimizer.named_moments())


def restore(
    checkpointer: Checkpointer,
    path: Path,
    engine: ZeroEngine,
    optimizer: Optimizer,
    others: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Fill weights, moments and counts of updates, and `others` where the checkpoint has them.

    Moments of what was frozen there are 0. Returns the trainer's state.
    """
    trained = trained_tensors(engine, optimizer)
    state, absent = checkpointer.load(path, {**trained, **others})
    steps = state["optimizer_steps"]
    if isinstance(steps, int):  # of a version without frozen parts
        steps = dict.fromkeys(engine.trainable, steps)
    new = [name for name in engine.trainable if name not in steps]
    known = {f"{moment}.{name}" for name in new for moment in MOMENTS}
    lost = [name for name in absent if name in trained and name not in known]
    if lost:
        raise CheckpointError(f"{path} lacks {len(lost)} tensors, the first is {lost[0]}")
    for name in known:
        local_part(trained[name]).zero_()
    if new:
        log.info("%d parameters were frozen there: their moments begin at 0", len(new))
    optimizer.set_steps(steps)
    engine.drop_gathered()
    return state
