"""Whether the disk has room for a run's checkpoints."""

import math
import os
import re
from pathlib import Path

from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import GIB, count_model, frozen_of
from fulmen.trainer.stages import list_stages

_MOMENTS = 2
_FP32 = 4


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: weights, and of what trains two moments, all fp32."""
    frozen = frozen_of(config)
    return _FP32 * sum(
        math.prod(shape) * (1 if name in frozen else 1 + _MOMENTS)
        for name, shape in count_model(config.model).shapes
    )


def check_disk(config: RunConfig, folder: Path) -> None:
    """`ValueError` if the checkpoints that a run will have at once do not fit below `folder`.

    That is most while a new one is written: it is whole before an old one goes, so there are
    `checkpoint.keep` beside it, the one that health would go back to if it is older than those, and
    the ends of stages before, which stay. What a save leaves that breaks off goes before the next
    one begins. So all that lies there is room, but for broken ones that were set aside.
    """
    stages = [stage.config for stage in list_stages(config)]
    count = len(stages)  # those before the last end in one that stays, and one is being written
    counted = "one being written, ends of stages"
    if config.checkpoint.every_steps is not None:
        count += config.checkpoint.keep + any(map(_goes_further_back, stages))
        counted += ", checkpoint.keep, one to go back to"
    size = max(map(checkpoint_bytes, stages))
    there = sum(
        file.stat().st_size
        for path in folder.glob("*step_*")
        if re.fullmatch(r"step_\d+|\.step_\d+\..*", path.name)
        for file in path.rglob("*.distcp")
    )
    free, _ = space(folder)
    if free + there >= count * size:
        return
    raise ValueError(
        f"{count} checkpoints of {gib(size)} ({counted}) "
        f"do not fit into {folder}: {gib(free)} free, {gib(there)} in checkpoints of this run. "
        "Free the disk, set run_root to another one or checkpoint.keep to less; "
        "trainer.allow_misfit=true begins all the same"
    )


def _goes_further_back(config: RunConfig) -> bool:
    """Whether the newest from before a bad step in the window can be older than those kept."""
    every = config.checkpoint.every_steps
    assert every is not None
    health = config.health
    return health.enabled and (config.checkpoint.keep - 1) * every < health.window


def describe_space(folder: Path, needed: int) -> str:
    """What `folder`'s file system has and a checkpoint needs, for a message."""
    try:
        free, total = space(folder)
    except OSError as error:
        return f"{folder} cannot be looked at: {error}"
    return f"{folder} has {gib(free)} free of {gib(total)}, a checkpoint needs {gib(needed)}"


def space(folder: Path) -> tuple[int, int]:
    """Bytes that this user may write to the file system of `folder`, and all it has."""
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.3g} GiB"
