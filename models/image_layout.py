"""How an image of any size becomes tiles, and its tiles' patches become image tokens.

Arithmetic only, without torch, so that worker processes that decode images share it. It follows
LLaVA-NeXT, as the released VL-01 does: one thumbnail, and a grid of tiles of the shape that keeps
most of the image. The image is scaled into the grid with its aspect ratio and padded on both sides;
the patches that padding alone fills are left out again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""CLIP's, of red, green and blue from 0 to 1; the tower takes `(value - mean) / std`."""
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Likewise."""
NEWLINE = -1
"""In `token_sources`, the token that ends a row of patches."""


@dataclass(frozen=True)
class Tiling:
    """Size of a tile, and the grids of tiles that there are."""

    tile_size: int = 336
    """Pixels of a tile's side."""
    patch_size: int = 14
    """Pixels of a patch's side; one token each."""
    max_side: int = 6
    """Tiles along one side of a grid."""
    max_tiles: int = 18
    """Tiles of a grid, without the thumbnail; 0 = the thumbnail alone."""

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile's side."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Tokens that the tower makes of a tile."""
        return self.patches_per_side**2

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of every grid, 28 in the released model."""
        sides = range(1, self.max_side + 1)
        return [(r, c) for r in sides for c in sides if r * c <= self.max_tiles]

    @property
    def pinpoints(self) -> list[tuple[int, int]]:
        """The grids in pixels, (height, width); config.json's `image_grid_pinpoints`."""
        return [(r * self.tile_size, c * self.tile_size) for r, c in self.grids]


RELEASED = Tiling()
"""VL-01's."""


@dataclass(frozen=True)
class ImageLayout:
    """What one image becomes. A thumbnail alone has a grid and a map of 0 x 0."""

    tiling: Tiling
    """The rules that it follows."""
    rows: int
    """Tiles of the grid from top to bottom."""
    columns: int
    """Tiles of the grid from left to right."""
    top: int
    """Patches of the grid cut off above the map, and as many below."""
    left: int
    """Patches of the grid cut off left of the map, and as many right."""

    @property
    def canvas(self) -> tuple[int, int]:
        """(width, height) of the grid in pixels, into which the image is scaled and padded."""
        return self.columns * self.tiling.tile_size, self.rows * self.tiling.tile_size

    @property
    def num_tiles(self) -> int:
        """Tiles that go through the tower: the thumbnail, then the grid's row by row."""
        return 1 + self.rows * self.columns

    @property
    def map_rows(self) -> int:
        """Rows of patches that are kept of the grid; a newline ends each."""
        return self.rows * self.tiling.patches_per_side - 2 * self.top

    @property
    def map_columns(self) -> int:
        """Patches of each row that are kept of the grid."""
        return self.columns * self.tiling.patches_per_side - 2 * self.left

    @property
    def num_tokens(self) -> int:
        """Image tokens: the thumbnail's, then the map's with its newlines."""
        return self.tiling.patches_per_tile + self.map_rows * (self.map_columns + 1)


@lru_cache(maxsize=4096)
def image_layout(width: int, height: int, tiling: Tiling = RELEASED) -> ImageLayout:
    """The layout of an image of `width` x `height` pixels.

    `ValueError` for an image without pixels, and for one so long that scaled into any grid it is
    thinner than a patch: nothing of it would be left.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no content")
    if not tiling.grids:
        return ImageLayout(tiling, 0, 0, 0, 0)
    high, wide = select_best_resolution((height, width), tiling.pinpoints)
    rows, columns = high // tiling.tile_size, wide // tiling.tile_size
    top, left = _padding(
        width, height, rows * tiling.patches_per_side, columns * tiling.patches_per_side
    )
    layout = ImageLayout(tiling, rows, columns, top, left)
    if layout.map_rows < 1 or layout.map_columns < 1:
        raise ValueError(
            f"an image of {width} x {height} pixels is thinner than one patch of "
            f"{tiling.patch_size} pixels when it is scaled into {wide} x {high}"
        )
    return layout


def select_best_resolution(
    size: tuple[int, int], resolutions: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """The resolution that keeps most pixels of an image, then wastes least, then comes first.

    All are (height, width). An image is never counted for more than the pixels that it has.
    """
    height, width = size
    best, most_kept, least_wasted = (0, 0), 0, 0
    for high, wide in resolutions:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = high * wide - kept
        if best == (0, 0) or kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (high, wide), kept, wasted
    return best


def _padding(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Patches of (top, left) padding of an image in a map of rows x columns, rounded down."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def token_sources(layout: ImageLayout, first_tile: int = 0) -> np.ndarray:
    """`[num_tokens]` int64: the patch that each image token shows, or `NEWLINE`.

    Patches are counted tile by tile, `tile * patches_per_tile + patch`, each tile's row by row,
    where the image's own tiles begin with `first_tile`.
    """
    side = layout.tiling.patches_per_side
    first = first_tile * side * side
    thumbnail = np.arange(first, first + side * side)
    if layout.num_tiles == 1:
        return thumbnail
    patches = np.arange(layout.rows * layout.columns * side * side).reshape(
        layout.rows, layout.columns, side, side
    )
    rows, columns = layout.rows * side, layout.columns * side
    grid = patches.transpose(0, 2, 1, 3).reshape(rows, columns) + first + side * side
    kept = grid[layout.top : rows - layout.top, layout.left : columns - layout.left]
    ended = np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([thumbnail, ended.ravel()])


def place_images(
    images: Iterable[tuple[int, ImageLayout]], first_token: int = 0, end_token: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where the image tokens of a micro-batch lie, and what each of them shows.

    Both are `[image_tokens]` int64: places counted from `first_token`, and sources as those of
    `token_sources`, counted over the tiles of all images, one image's behind the other's.

    Args:
        images: first token, in the flattened micro-batch, and layout of each image.
        first_token: of the part of the micro-batch that is asked for.
        end_token: behind that part; None = to the end.
    """
    places, sources = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    first_tile = 0
    for first, layout in images:
        end = first + layout.num_tokens
        begin, end = max(first, first_token), end if end_token is None else min(end, end_token)
        if begin < end:
            places.append(np.arange(begin, end) - first_token)
            sources.append(token_sources(layout, first_tile)[begin - first : end - first])
        first_tile += layout.num_tiles
    return np.concatenate(places), np.concatenate(sources)
