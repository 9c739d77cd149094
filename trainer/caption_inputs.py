"""From a micro-batch of captioned images to the arguments of `CoCa.forward`."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fulmen.data.image_batches import normalise_tiles
from fulmen.data.packing import IGNORE_LABEL, PackedBatch
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.models.coca import Captions
from fulmen.models.config import ModelConfig
from fulmen.trainer.inputs import to_device

_ONE_OF_EACH = (
    "objective=coca learns from captions, whose documents are one image of one tile and then its "
    "text: prepare captions with resolution=fixed"
)


def most_pairs(config: ModelConfig, micro_batch_tokens: int) -> int:
    """The most captioned images that a micro-batch can hold: each has an end, and its patches."""
    assert config.vision is not None
    return max(1, micro_batch_tokens // (config.vision.tiling.patches_per_tile + 1))


def caption_inputs(
    batch: PackedBatch, config: ModelConfig, device: torch.device
) -> tuple[Tensor, Captions]:
    """Images and captions of a packed micro-batch, whose documents are one of each.

    A batch of padding alone gives one row that does not count. ValueError for other documents.
    """
    assert config.vision is not None
    patches, side = config.vision.tiling.patches_per_tile, config.vision.tile_size
    images = () if batch.images is None else batch.images.images
    bounds = batch.cu_seqlens.tolist()
    documents = [span for span in pairwise(bounds) if span[0] < batch.num_tokens]
    begins = [begin for begin, _ in documents]
    if begins != [image.first for image in images] or any(i.layout.num_tiles != 1 for i in images):
        raise ValueError(f"data.sources: a document is not a caption: {_ONE_OF_EACH}")
    if not documents:
        empty = torch.zeros(1, 1, dtype=torch.int64)
        captions = Captions(empty, torch.ones(1, dtype=torch.int64), empty + IGNORE_LABEL, 0)
        pixels = torch.zeros(1, 3, side, side)
    else:
        assert batch.images is not None
        # From the last image token, from which the first word is predicted, to before the end.
        rows = [slice(begin + patches - 1, end - 1) for begin, end in documents]
        captions = Captions(
            pad_rows([batch.input_ids[0, row] for row in rows], 0),
            torch.tensor([row.stop - row.start for row in rows]),
            pad_rows([batch.labels[0, row] for row in rows], IGNORE_LABEL),
        )
        pixels = normalise_tiles(to_device(batch.images.tiles, device))
    return pixels.to(device), move_captions(captions, device)


def move_captions(captions: Captions, device: torch.device) -> Captions:
    """The same on a device."""
    labels = captions.labels
    return Captions(
        to_device(captions.input_ids, device),
        to_device(captions.lengths, device),
        None if labels is None else to_device(labels, device),
        captions.count,
    )


def pad_rows(rows: Sequence[Tensor], value: int) -> Tensor:
    """`[rows, longest]` of one-dimensional tensors."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def check_captions(split: PreparedSplit, config: ModelConfig) -> None:
    """ValueError, naming the keys, for a source that is not of captions that the model can take."""
    assert config.vision is not None
    assert config.coca is not None
    index, key = split.images, f"data.sources.{split.name}"
    if index is None or index.tiling.max_tiles != 0:
        raise ValueError(
            f"{key}: {split.path} has no images of one tile each, which objective=coca learns "
            "from: prepare captions with launch/prepare_images.py resolution=fixed "
            f"tile_size={config.vision.tile_size}"
        )
    totals = read_manifest(split.path)["splits"][split.split]
    counts = {totals["documents"], totals["images"], totals["tiles"]}
    if len(counts) > 1 or totals["pairs"] or index.images(0, 0)[0].first:
        raise ValueError(f"{key}: {split.path} has other documents: {_ONE_OF_EACH}")
    most = config.vision.tiling.patches_per_tile + config.coca.max_text_tokens
    if index.longest > most:
        raise ValueError(
            f"{key}: {split.path} has a document of {index.longest} tokens, and an image with a "
            f"caption of model.coca.max_text_tokens={config.coca.max_text_tokens} has {most}: "
            f"prepare it with max_caption_tokens={config.coca.max_text_tokens}"
        )
