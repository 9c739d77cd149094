"""Decode the images of a micro-batch into tiles, in processes ahead of the training step.

Free of torch, so that a worker starts quickly and stays small.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fulmen.data.image_shards import StoredImage
from fulmen.data.images import ImageError, ImageLimits, Pixels, cut_tiles, decode_image
from fulmen.data.workers import Workers

# What prepare_images let pass is good.
_LIMITS = ImageLimits(max_pixels=2**62, max_aspect_ratio=float("inf"))
_LOG = logging.getLogger("fulmen.data")


@dataclass(frozen=True)
class TileJob:
    """Some neighbouring tiles of one image."""

    image: StoredImage
    begin: int
    end: int


@dataclass(frozen=True)
class Decoded:
    """The tiles `[n, 3, tile, tile]` of a job; or what went wrong, and black."""

    tiles: Pixels | None
    problem: str


class ImageDecoder:
    """Tiles of images, decoded by `num_workers` processes (0 = this one).

    An image that cannot be read or decoded any more, though preparation found it whole, becomes
    black tiles: the plan of the run stays as it is. Each is logged, and counted in `failures`.
    """

    def __init__(self, num_workers: int = 0) -> None:
        self._workers = Workers(num_workers)
        self.failures = 0

    def tiles(self, jobs: Sequence[TileJob]) -> Iterator[tuple[Pixels, str]]:
        """Tiles of each job, in order, and "" or what went wrong."""
        for job, done in zip(jobs, self._workers.map(_decode, jobs, lost=_lost), strict=True):
            if done.tiles is not None:
                yield done.tiles, ""
                continue
            self.failures += 1
            image = job.image
            problem = f"image at byte {image.offset} of {image.path}: {done.problem}"
            _LOG.warning("%s; black tiles take its place", problem)
            size = image.layout.tiling.tile_size
            yield np.zeros((job.end - job.begin, 3, size, size), np.uint8), problem

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


def read_image(image: StoredImage) -> Image.Image:
    """An image of a prepared folder; `OSError` or `ImageError` where it is not as it was then."""
    with open(image.path, "rb") as file:
        file.seek(image.offset)
        data = file.read(image.num_bytes)
    if len(data) != image.num_bytes:
        raise ImageError("truncated", "the file ends early")
    picture = decode_image(data, _LIMITS)
    if picture.size != (image.width, image.height):
        # As of TIFFs that lie on their side: an earlier fulmen turned them twice.
        raise ImageError(
            "changed",
            f"{picture.width} x {picture.height} pixels, {image.width} x {image.height} in its "
            "index: prepare the folder anew",
        )
    return picture


def _decode(job: TileJob) -> Decoded:
    try:
        picture = read_image(job.image)
    except (OSError, ImageError) as error:
        return Decoded(None, f"{error}")
    return Decoded(cut_tiles(picture, job.image.layout)[job.begin : job.end], "")


def _lost(job: TileJob) -> Decoded:
    return Decoded(None, "its decoder crashed")
