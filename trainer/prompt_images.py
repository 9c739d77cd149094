"""The images of a text that is read: their tiles, for the tower, and where their tokens stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fulmen.data.image_batches import normalise_tiles
from fulmen.data.images import cut_tiles
from fulmen.models.image_layout import ImageLayout, place_images, tile_range
from fulmen.models.vl import Images
from fulmen.parallel.patches import PatchRoute


@dataclass(frozen=True)
class Picture:
    """A decoded image in a text."""

    first: int
    """Place of the first of its tokens."""
    layout: ImageLayout
    image: Image.Image


@dataclass(frozen=True)
class PromptImages:
    """The images of a text, none being valid too.

    Ranks that share a row run equal shares of the tiles. Each gets all patches: it knows of no
    token before its piece comes where it will lie.
    """

    placed: tuple[tuple[int, ImageLayout], ...]
    """First token and layout of each, in the order of the text."""
    tiles: Tensor
    """`[tiles, 3, side, side]` uint8, this rank's share."""
    rank: int
    ranks: int

    @classmethod
    def of(
        cls, pictures: Sequence[Picture], *, tile_size: int, rank: int = 0, ranks: int = 1
    ) -> Self:
        """Cut what the tower is to see on `rank` of the `ranks` that share a row."""
        ends = [0, *accumulate(picture.layout.num_tiles for picture in pictures)]
        begin, end = tile_range(ends[-1], rank, ranks)
        tiles = [np.empty((0, 3, tile_size, tile_size), np.uint8)]
        for picture, first, last in zip(pictures, ends, ends[1:], strict=False):
            if first < end and last > begin:
                cut = cut_tiles(picture.image, picture.layout)
                tiles.append(cut[max(begin - first, 0) : end - first])
        placed = tuple((picture.first, picture.layout) for picture in pictures)
        return cls(placed, torch.from_numpy(np.concatenate(tiles)), rank, ranks)

    def inputs(self, here: slice, device: torch.device, *, with_tiles: bool) -> Images:
        """For the tokens `here` of the text; the tiles come with the first of them alone."""
        places, sources = place_images(self.placed, here.start, here.stop)
        pixels = self.tiles if with_tiles else self.tiles[:0]
        return Images(
            normalise_tiles(pixels.to(device)),
            torch.from_numpy(places).to(device),
            torch.from_numpy(sources).to(device),
            self._route(device) if with_tiles and self.ranks > 1 else None,
        )

    def _route(self, device: torch.device) -> PatchRoute:
        """Every rank's patches to every rank, in the order of the tiles."""
        num_tiles = sum(layout.num_tiles for _, layout in self.placed)
        per_tile = self.placed[0][1].tiling.patches_per_tile if self.placed else 0
        shares = [tile_range(num_tiles, rank, self.ranks) for rank in range(self.ranks)]
        patches = [per_tile * (end - begin) for begin, end in shares]
        own = patches[self.rank]
        rows = torch.arange(own, device=device).repeat(self.ranks)
        return PatchRoute(rows, [own] * self.ranks, patches)


def no_images(device: torch.device) -> Images:
    """What a pass without image tokens brings to a tower that has seen all there is."""
    none = torch.zeros(0, dtype=torch.long, device=device)
    return Images(none, none, none)
