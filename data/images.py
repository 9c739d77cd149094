"""From the bytes of an image to the tiles which the vision tower sees.

A picture is decoded to 8-bit RGB, fitted into the best of the grid shapes, cut row by row into
square tiles, and preceded by a thumbnail. Pixels are those of transformers'
`LlavaNextImageProcessor` (its Pillow version), bit for bit. Tiles stay uint8 until they are on the
device (`image_batches.normalise_tiles`): a quarter of the bytes to move.

What cannot be an image is an `ImageError` with one of a few kinds, so that it can be counted.
"""

import io
import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import (  # the plugins, because Pillow knows only formats that were imported
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401 (a JPEG may be one: many phones write them)
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from fulmen.models.image_layout import ImageLayout, Tiling, image_layout

# What a photograph or a scan comes as; the other decoders of Pillow start programs, or are rarely
# used and so rarely safe.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
Pixels = npt.NDArray[np.uint8]


class ImageError(Exception):
    """An image that cannot be used: args are its kind, for counts, and what is wrong."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class ImageLimits:
    """What is still taken for an image."""

    max_pixels: int = 50_000_000
    """A small file can claim, or hold, gigabytes of pixels: the header is looked at first."""
    max_aspect_ratio: float = 100.0
    """Longer side by shorter side; beyond it nothing is left of the shorter one in the grid."""


def image_size(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Width and height as shown, after its EXIF rotation, from the header; ImageError if unfit."""
    image = _open(data, limits)
    width, height = image.size
    return (height, width) if _exif_rotation(image) >= 5 else (width, height)


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The first frame as 8-bit RGB, upright; ImageError for whatever is no whole image.

    Transparency is laid on white, as transformers does. Colour profiles are not applied.
    """
    image = _open(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rotation = _exif_rotation(image)
            if image.format == "PNG":
                # Its checksums tell noise from pixels; Pillow looks at none of them by itself.
                Image.open(io.BytesIO(data), formats=FORMATS).verify()
            image.load()
            upright = _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # each codec has exceptions of its own
        kind = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise ImageError(kind, _one_line(error)) from None
    if rotation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[rotation])
    return upright


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image with its header read and judged, no pixel yet decoded."""
    if not data:
        raise ImageError("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # we have a limit of our own
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith(b"\x89PNG") and 0 in struct.unpack(">II", data[16:24].ljust(8, b"x")):
            raise ImageError("zero_sized", "a PNG without pixels") from None
        raise ImageError("not_an_image", f"not one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", _one_line(error)) from None
    except Exception as error:
        raise ImageError("undecodable", _one_line(error)) from None
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ImageError("zero_sized", f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError(
            "too_many_pixels",
            f"{width} x {height} pixels, more than max_image_pixels={limits.max_pixels}",
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageError(
            "aspect_ratio",
            f"{width} x {height} pixels, beyond max_aspect_ratio={limits.max_aspect_ratio}",
        )
    return image


def _exif_rotation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the EXIF data is damaged, which hurts no pixel.

    A TIFF has none left: Pillow turns it itself.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, EOFError, OSError, struct.error):
        return 1
    return value if value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255: nearly all white.
        wide = np.asarray(image)
        return Image.fromarray((wide >> 8).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("I", "F"):
        return _scaled(np.asarray(image, dtype=np.float64)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        shown = image.convert("RGBA")
        background = Image.new("RGBA", shown.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, shown).convert("RGB")
    return image.convert("RGB")


def _scaled(values: npt.NDArray[np.float64]) -> Image.Image:
    """32-bit grey values of unknown range: from least to most."""
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    return Image.fromarray(((values - low) * (255 / span)).round().astype(np.uint8), "L")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def layout_of(size: tuple[int, int], tiling: Tiling) -> ImageLayout:
    """`image_layout` of a width and height; ImageError where nothing of the image would be left."""
    try:
        return image_layout(*size, tiling)
    except ValueError as error:
        raise ImageError("aspect_ratio", str(error)) from None


def cut_tiles(image: Image.Image, layout: ImageLayout) -> Pixels:
    """Tiles `[layout.num_tiles, 3, tile, tile]` uint8: the thumbnail, then the grid row by row."""
    tile = layout.tiling.tile_size
    thumbnail = _channels_first(image.resize((tile, tile), Image.Resampling.BICUBIC))
    if layout.num_tiles == 1:
        return thumbnail[None]
    padded = _channels_first(_fit(image, *layout.canvas))
    grid = padded.reshape(3, layout.rows, tile, layout.columns, tile)
    grid = grid.transpose(1, 3, 0, 2, 4).reshape(-1, 3, tile, tile)
    return np.concatenate([thumbnail[None], grid])


def image_tiles(data: bytes, tiling: Tiling, limits: ImageLimits) -> tuple[Pixels, ImageLayout]:
    """All of it: from the bytes of a file to its uint8 tiles and where they belong."""
    image = decode_image(data, limits)
    layout = layout_of(image.size, tiling)
    return cut_tiles(image, layout), layout


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled to fit, in the middle of black."""
    scale_width, scale_height = width / image.width, height / image.height
    # ceil, as transformers does it here (the unpadding of features takes int).
    if scale_width < scale_height:
        size = width, min(math.ceil(image.height * scale_width), height)
    else:
        size = min(math.ceil(image.width * scale_height), width), height
    scaled = image.resize(size, Image.Resampling.BICUBIC)
    padded = Image.new("RGB", (width, height))
    padded.paste(scaled, ((width - size[0]) // 2, (height - size[1]) // 2))
    return padded


def _channels_first(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
