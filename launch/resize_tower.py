"""Fit a checkpoint's vision tower to tiles of another size: see docs/vision.md.

python launch/resize_tower.py run=RUN_FOLDER tile_size=336 output=CHECKPOINT_FOLDER
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from fulmen.launch.checkpoints import find_checkpoint
from fulmen.launch.hydra_main import run_hydra


@dataclass
class ResizeConfig:
    """Keys of `resize_tower.py`."""

    run: str | None = None
    """Run folder: its newest checkpoint is used."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    tile_size: int = MISSING
    """Pixels of a tile's side."""
    output: str = MISSING
    """Checkpoint folder to make; a run begins from it with checkpoint.resume."""


def run(config: ResizeConfig) -> None:
    """Write the folder; mistakes of the user leave as `ValueError`."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)

    from fulmen.trainer.resize_tower import resize_tower

    resize_tower(checkpoint, Path(config.output), config.tile_size)
    print(f"wrote {config.output}")


def main() -> None:
    """Entry point."""
    run_hydra(run, "resize_tower", ResizeConfig)


if __name__ == "__main__":
    main()
