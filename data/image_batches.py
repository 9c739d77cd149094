"""The images and pairs of a micro-batch, and what is known of them before it is read."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fulmen.data.image_decoding import ImageDecoder, TileJob
from fulmen.data.image_shards import StoredImage
from fulmen.models.image_layout import PIXEL_MEAN, PIXEL_STD, tile_range


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, neighbours in the micro-batch."""

    document: int
    """Number, in cu_seqlens, of the preferred one; the other is the next."""
    source: str
    """Name of the source."""
    number: int
    """Number of the pair in the source: what stored log-probabilities are looked up by."""


@dataclass(frozen=True)
class PackedImages:
    """The images of one micro-batch in the order of their tokens, and a part of their tiles."""

    images: tuple[StoredImage, ...]
    """`first` counts from the micro-batch's start; `layout` tells tokens and tiles."""
    tiles: Tensor
    """`[tiles of this part, 3, tile, tile]` uint8, on the CPU."""
    first_tile: int
    """Number of `tiles[0]` among the tiles of all images, back to back."""
    failures: tuple[str, ...] = ()
    """Images of this part that are black because they could not be decoded."""

    @property
    def num_tiles(self) -> int:
        """Tiles of all images, whatever part is here."""
        return sum(image.layout.num_tiles for image in self.images)


def undecoded(images: Sequence[StoredImage]) -> PackedImages:
    """The images of a micro-batch, without tiles."""
    return PackedImages(tuple(images), torch.empty((0, 3, 0, 0), dtype=torch.uint8), 0)


def decode_images(
    batches: Sequence[PackedImages],
    decoder: ImageDecoder,
    *,
    part: int = 0,
    num_parts: int = 1,
    tile_size: int,
) -> list[PackedImages]:
    """The same with a part of the tiles of each, from the images that have tiles in it.

    All at once, so that no process waits for the last image of a micro-batch.
    """
    jobs, done = [], []
    for batch in batches:
        ends = np.cumsum([0, *(image.layout.num_tiles for image in batch.images)]).tolist()
        begin, end = tile_range(ends[-1], part, num_parts)
        mine = [
            TileJob(image, max(begin - first, 0), min(end, last) - first)
            for image, first, last in zip(batch.images, ends[:-1], ends[1:], strict=True)
            if first < end and last > begin
        ]
        jobs += mine
        tiles = torch.empty((end - begin, 3, tile_size, tile_size), dtype=torch.uint8)
        done.append((batch, len(mine), begin, tiles))
    decoded = decoder.tiles(jobs)
    filled = []
    for batch, num_jobs, begin, tiles in done:
        at, failures = 0, []
        for pixels, problem in islice(decoded, num_jobs):
            tiles[at : at + len(pixels)] = torch.from_numpy(pixels)
            at += len(pixels)
            if problem:
                failures.append(problem)
        assert at == len(tiles)
        filled.append(PackedImages(batch.images, tiles, begin, tuple(failures)))
    return filled


def normalise_tiles(tiles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the tower takes: uint8 `[..., 3, tile, tile]`, on any device, by CLIP's mean and std."""
    scale, shift = _clip(tiles.device)
    return torch.addcmul(shift, tiles.float(), scale).to(dtype)


@functools.lru_cache(maxsize=8)
def _clip(device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand `[3, 1, 1]` of the normalisation: copied to a device once."""
    mean, std = (torch.tensor(one).reshape(3, 1, 1) for one in (PIXEL_MEAN, PIXEL_STD))
    return (1 / (255 * std)).to(device), (-mean / std).to(device)
