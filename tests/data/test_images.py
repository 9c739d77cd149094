"""Decoding and tiling against transformers' own processor, and against pictures known by heart."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fulmen.data.image_batches import normalise_tiles
from fulmen.data.images import (
    ImageError,
    ImageLimits,
    decode_image,
    image_size,
    image_tiles,
)
from fulmen.models.image_layout import RELEASED, Tiling

LIMITS = ImageLimits()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Blocks of random colours: edges for the resampling to ring at."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def processor() -> Any:
    module = "transformers.models.llava_next.image_processing_pil_llava_next"
    theirs = pytest.importorskip(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs.LlavaNextImageProcessorPil(
            image_grid_pinpoints=[list(pair) for pair in RELEASED.pinpoints],
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
        )


# Sides that are multiples of nothing, smaller than a tile, and scaled with a remainder.
@pytest.mark.parametrize(
    ("width", "height"),
    [(336, 336), (640, 480), (333, 97), (97, 333), (700, 1000), (1279, 721), (20, 31), (2500, 40)],
)
def test_pixels_are_those_of_transformers(width: int, height: int) -> None:
    image = noise(width, height)
    theirs = processor()(image, return_tensors="pt")["pixel_values"][0]
    tiles, layout = image_tiles(encoded(image), RELEASED, LIMITS)
    assert tiles.dtype == np.uint8
    assert tiles.shape == theirs.shape == (layout.num_tiles, 3, 336, 336)
    ours = normalise_tiles(torch.from_numpy(tiles))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    # Both were rounded to 8 bits: the integers themselves are equal.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    assert torch.equal(
        (theirs * std + mean).mul(255).round().to(torch.uint8), torch.as_tensor(tiles)
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK"])
def test_modes_are_converted_as_by_transformers(mode: str) -> None:
    image = noise(60, 50)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    theirs = processor()(Image.open(io.BytesIO(encoded(image, kind))), return_tensors="pt")
    tiles, _ = image_tiles(encoded(image, kind), RELEASED, LIMITS)
    ours = normalise_tiles(torch.from_numpy(tiles))
    torch.testing.assert_close(ours, theirs["pixel_values"][0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind: str) -> None:
    image = noise(80, 48)
    decoded = decode_image(encoded(image, kind), LIMITS)
    assert (decoded.mode, decoded.size) == ("RGB", (80, 48))
    assert np.abs(np.asarray(decoded, float) - np.asarray(image, float)).mean() < 30


def test_sixteen_bits_keep_their_shades() -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(ramp)), LIMITS))
    assert np.array_equal(decoded[..., 0], (ramp >> 8).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(image), LIMITS).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("rotation", range(1, 9))
def test_exif_rotation(rotation: int) -> None:
    image = noise(40, 24)
    exif = Image.Exif()
    exif[0x0112] = rotation
    data = encoded(image, "PNG", exif=exif)
    upright = decode_image(data, LIMITS)
    assert image_size(data, LIMITS) == upright.size == ((24, 40) if rotation >= 5 else (40, 24))
    # Undone by numpy: where the first row and column of the stored picture are to be seen.
    turned = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x),
    }  # fmt: skip
    assert np.array_equal(np.asarray(upright), turned[rotation](np.asarray(image)))


@pytest.mark.parametrize("rotation", [1, 3, 6])
def test_a_tiff_is_turned_once(rotation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = rotation
    data = encoded(noise(40, 24), "TIFF", exif=exif)
    upright = decode_image(data, LIMITS)
    assert image_size(data, LIMITS) == upright.size == ((24, 40) if rotation == 6 else (40, 24))
    turns = {1: 0, 3: 2, 6: -1}[rotation]
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(noise(40, 24)), turns))


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode_image(data, LIMITS).getpixel((4, 4))
        assert red > 240 > 10 > blue


def test_tiles_are_row_by_row_in_the_middle_of_black() -> None:
    # 2 x 3 tiles, each of one colour; 100 wide, so that the sides of the grid are black.
    tiling = Tiling(tile_size=28, patch_size=14, max_side=3, max_tiles=6)
    pixels = np.arange(6, dtype=np.uint8).reshape(3, 2).repeat(28, 0).repeat(28, 1) * 20 + 50
    image = Image.fromarray(pixels).convert("RGB")
    tiles, layout = image_tiles(encoded(image), tiling, LIMITS)
    assert (layout.rows, layout.columns, len(tiles)) == (3, 2, 7)
    assert tiles[1:, 0, 14, 14].tolist() == [50, 70, 90, 110, 130, 150]
    narrow = image.crop((0, 0, 40, 84))
    tiles, layout = image_tiles(encoded(narrow), tiling, LIMITS)
    assert (layout.rows, layout.columns) == (3, 2)
    assert not tiles[1, :, :, :8].any()
    assert not tiles[2, :, :, 20:].any()
    assert tiles[1, :, :, 8:].all()
    assert tiles[2, :, :, :20].all()
    assert tiles[0].all(), "the thumbnail is stretched, not padded"


@pytest.mark.parametrize("tile_size", [336, 224])
def test_a_fixed_size_is_the_thumbnail_alone(tile_size: int) -> None:
    image = noise(500, 300)
    tiles, layout = image_tiles(encoded(image), Tiling(tile_size, max_tiles=0), LIMITS)
    assert (len(tiles), layout.num_tokens) == (1, (tile_size // 14) ** 2)
    wanted = np.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    assert np.array_equal(tiles[0].transpose(1, 2, 0), wanted)


def test_limits() -> None:
    with pytest.raises(ImageError) as raised:
        decode_image(encoded(noise(40, 30)), ImageLimits(max_pixels=1199))
    assert raised.value.kind == "too_many_pixels"
    decode_image(encoded(noise(40, 30)), ImageLimits(max_pixels=1200))
    with pytest.raises(ImageError) as raised:
        decode_image(encoded(noise(41, 4)), ImageLimits(max_aspect_ratio=10))
    assert raised.value.kind == "aspect_ratio"


def test_normalised_in_the_asked_dtype() -> None:
    tiles = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    wanted = (
        tiles.double() / 255
        - torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1).double()
    ) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    assert normalise_tiles(tiles, torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(normalise_tiles(tiles).double(), wanted, atol=1e-6, rtol=0)
