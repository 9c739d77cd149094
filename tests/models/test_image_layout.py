"""Grids, padding and numbers of image tokens, against LLaVA-NeXT's code in transformers."""

import random
import subprocess
import sys

import numpy as np
import pytest

from fulmen.models.image_layout import NEWLINE, RELEASED, Tiling, image_layout, token_sources

pytestmark = pytest.mark.fast


def sizes(count: int = 300) -> list[tuple[int, int]]:
    """(width, height) small and large, wide and high, and of one aspect ratio exactly."""
    draw = random.Random(0)
    some = [(draw.randint(20, 3000), draw.randint(20, 3000)) for _ in range(count)]
    exact = [(336 * c, 336 * r) for c in range(1, 8) for r in range(1, 8)]
    return [*some, *exact, (1, 1), (13, 13), (335, 337), (2017, 2015), (10_000, 900), (90, 3001)]


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (336, 336, 1_176),
        (640, 480, 2_340),
        (1280, 720, 5_814),
        (1920, 1080, 9_864),
        (4000, 4000, 9_888),
        (1008, 2016, 11_088),
    ],
)
def test_published_numbers_of_tokens(width: int, height: int, tokens: int) -> None:
    assert image_layout(width, height).num_tokens == tokens


def test_grids_of_the_release() -> None:
    """All of 6 x 6 but those with four or more on both sides, 4 x 4 apart."""
    left_out = {(r, c) for r in (4, 5, 6) for c in (4, 5, 6)} - {(4, 4)}
    everything = [(r, c) for r in range(1, 7) for c in range(1, 7)]
    assert RELEASED.grids == [grid for grid in everything if grid not in left_out]
    assert len(RELEASED.pinpoints) == 28
    assert image_layout(1920, 1080).num_tiles == 19


@pytest.mark.parametrize("tiling", [RELEASED, Tiling(28, 7, 3, 4)])
def test_as_in_llava_next(tiling: Tiling) -> None:
    transformers = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    side = tiling.patches_per_side
    pinpoints = [list(pair) for pair in tiling.pinpoints]
    checked = set()
    for width, height in sizes():
        shape = transformers.get_anyres_image_grid_shape(
            (height, width), pinpoints, tiling.tile_size
        )
        grid = np.zeros((1, shape[0] * side, shape[1] * side))
        kept = transformers.unpad_image(grid, (height, width))
        if kept.size == 0:
            with pytest.raises(ValueError, match="thinner than one patch"):
                image_layout(width, height, tiling)
            continue
        layout = image_layout(width, height, tiling)
        assert (layout.rows, layout.columns) == shape, (width, height)
        assert (layout.map_rows, layout.map_columns) == kept.shape[1:], (width, height)
        checked.add(shape)
    assert len(checked) > (20 if tiling is RELEASED else 4)


def test_sources_of_tokens_by_hand() -> None:
    """Two by one tiles of 2 x 2 patches, of an image whose lower tile ends in padding."""
    tiling = Tiling(tile_size=8, patch_size=4, max_side=2, max_tiles=2)
    layout = image_layout(8, 16, tiling)
    assert (layout.rows, layout.columns, layout.num_tokens) == (2, 1, 4 + 4 * 3)
    n = NEWLINE
    expected = [20, 21, 22, 23, 24, 25, n, 26, 27, n, 28, 29, n, 30, 31, n]
    assert token_sources(layout, first_tile=5).tolist() == expected
    wide = image_layout(16, 4, tiling)
    assert (wide.top, wide.map_rows, wide.map_columns) == (0, 2, 4)
    assert token_sources(wide)[4:].tolist() == [4, 5, 8, 9, n, 6, 7, 10, 11, n]


def test_sources_name_each_kept_patch_once() -> None:
    for width, height in sizes(50):
        layout = image_layout(width, height)
        sources = token_sources(layout, first_tile=2)
        patches = sources[sources != NEWLINE]
        assert len(sources) == layout.num_tokens
        assert len(patches) == 576 + layout.map_rows * layout.map_columns
        assert len(set(patches.tolist())) == len(patches)
        assert patches.min() == 2 * 576
        assert patches.max() < (2 + layout.num_tiles) * 576


def test_a_thumbnail_alone() -> None:
    layout = image_layout(640, 480, Tiling(max_tiles=0))
    assert (layout.num_tiles, layout.num_tokens) == (1, 576)
    assert token_sources(layout, 1).tolist() == list(range(576, 1152))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (100_000, 10), (10, 100_000)])
def test_images_of_which_nothing_is_left(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"an image of {size[0]} x {size[1]} pixels"):
        image_layout(*size)


def test_needs_no_torch() -> None:
    code = "import sys, fulmen.models.image_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
