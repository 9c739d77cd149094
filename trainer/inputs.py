"""From a micro-batch to the arguments of the model, on this rank's device."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fulmen.data.image_batches import PackedImages, normalise_tiles
from fulmen.data.micro_batches import check_vision
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.models.config import VisionConfig
from fulmen.models.image_layout import place_images, tile_range
from fulmen.models.layers import packed_positions
from fulmen.models.vl import Images
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.patches import PatchRoute, plan_patches
from fulmen.parallel.sequence import RowPart


def model_inputs(
    batch: PackedBatch, mesh: Mesh, vision: VisionConfig | None = None
) -> dict[str, Any]:
    """Arguments of `TextModel.forward` for this rank's part of a micro-batch.

    `vision` is the model's. With it there are always images, if need be none of them: whether
    another data-parallel rank has some this rank cannot know, and all of them gather the tower's
    weights and sum its gradients together.
    """
    inputs: dict[str, Any] = {"num_tokens": batch.num_tokens}
    if vision is not None:
        images = batch.images
        if images is None:
            no_tiles = torch.empty(0, 3, vision.tile_size, vision.tile_size, dtype=torch.uint8)
            images = PackedImages((), no_tiles, 0)
        inputs["images"] = image_inputs(images, batch.input_ids.shape[1], mesh)
    ids, labels, cu_seqlens = batch.input_ids, batch.labels, batch.cu_seqlens
    if mesh.cp > 1:
        tokens = ids.shape[1] // mesh.cp
        part = RowPart(mesh.cp_rank, mesh.cp, tokens, tuple(cu_seqlens.tolist()))
        here = slice(part.first, part.first + tokens)
        positions = packed_positions(ids.shape[1], cu_seqlens, ids.device)[here]
        ids, labels = ids[:, here].contiguous(), labels[:, here].contiguous()
        cu_seqlens = torch.tensor([0, *accumulate(part.lengths)], dtype=torch.int32)
        inputs["num_tokens"] = min(max(batch.num_tokens - part.first, 0), tokens)
        inputs |= {"positions": to_device(positions, mesh.device), "row_part": part}
    return inputs | {
        "input_ids": to_device(ids, mesh.device),
        "labels": to_device(labels, mesh.device),
        "cu_seqlens": to_device(cu_seqlens, mesh.device),
        "document_lengths": cu_seqlens.diff().tolist(),
    }


def token_sources(batch: PackedBatch, mesh: Mesh) -> Tensor:
    """`[1, tokens]` number of each token's source, for this rank's part, on its device."""
    sources = batch.sources
    assert sources is not None
    tokens = sources.shape[1] // mesh.cp
    part = sources[:, mesh.cp_rank * tokens : (mesh.cp_rank + 1) * tokens]
    return to_device(part.contiguous(), mesh.device)


def image_inputs(images: PackedImages, num_tokens: int, mesh: Mesh) -> Images:
    """The images of a micro-batch of `num_tokens`, for this rank's part of it.

    The tiles have to be those that are this rank's, `tile_range(num_tiles, cp_rank, cp)`.
    """
    placed = [(image.first, image.layout) for image in images.images]
    here = tile_range(images.num_tiles, mesh.cp_rank, mesh.cp)
    assert here == (images.first_tile, images.first_tile + len(images.tiles))
    pixels = normalise_tiles(to_device(images.tiles, mesh.device))
    if mesh.cp == 1:
        return Images(pixels, *(_indices(part, mesh.device) for part in place_images(placed)))
    plan = plan_patches(placed, mesh.cp_rank, mesh.cp, num_tokens // mesh.cp)
    return Images(
        pixels,
        _indices(plan.places, mesh.device),
        _indices(plan.sources, mesh.device),
        PatchRoute(_indices(plan.rows, mesh.device), plan.send, plan.receive),
    )


def check_images(splits: Sequence[PreparedSplit], vision: VisionConfig | None) -> None:
    """ValueError, naming the keys, for sources whose images the model cannot see as prepared."""
    if vision is not None:
        check_vision(splits, vision.tiling, vision.image_token_id)
        return
    for split in splits:
        if split.images is not None:
            raise ValueError(
                f"data.sources.{split.name}: {split.path} has images, and the model has no eyes: "
                "take a model with model.vision, or another source"
            )


def _indices(array: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(array), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on a device, by pinned memory, so that nothing waits."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
