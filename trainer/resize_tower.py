"""A checkpoint's vision tower for tiles of another size, so that training goes on with those."""

import dataclasses
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from fulmen.models.vision import resize_positions
from fulmen.trainer.manifest import verify
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.weights import (
    CheckpointWeights,
    Piece,
    load_model_config,
    save_weights,
)

POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def resize_tower(source: Path, target: Path, tile_size: int) -> None:
    """Write the weights of `source` with position embeddings for tiles of `tile_size` pixels.

    They are resized as the tower itself would resize them for such tiles. Of the optimiser and the
    data nothing is taken over: a run starts from the new folder at step 0. `ValueError` for a
    checkpoint without a tower, or a size that has no whole patches.
    """
    verify(source)
    vision = load_model_config(source).vision
    if vision is None:
        raise ValueError(f"{source} has no vision tower")
    if tile_size < 1 or tile_size % vision.patch_size:
        raise ValueError(
            f"tile_size={tile_size}: must be a multiple of the tower's patch_size="
            f"{vision.patch_size}"
        )
    old = vision.tiling.patches_per_side
    new = dataclasses.replace(vision, tile_size=tile_size).tiling.patches_per_side
    weights = CheckpointWeights(source)

    def resized() -> Tensor:
        return resize_positions(weights.read(POSITIONS), old, new)

    pieces = []
    for name, shape in weights.shapes.items():
        if name == POSITIONS:
            pieces.append(Piece(name, (1 + new**2, shape[1]), (0, 1 + new**2), resized))
            continue
        for rows in weights.row_groups(name):
            pieces.append(Piece(name, shape, rows, partial(weights.read, name, rows=rows)))
    config = load_run_config(source)
    OmegaConf.update(config, "model.vision.tile_size", tile_size)
    as_dict = OmegaConf.to_container(config)
    assert isinstance(as_dict, dict)
    save_weights(target, pieces, {str(key): value for key, value in as_dict.items()})
