"""Pictures, and inputs of prepare_images that hold them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from fulmen.data.config import PrepareImagesConfig
from fulmen.data.prepare_images import prepare_images


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A webdataset shard."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(input: Any, output: Path, **options: Any) -> dict[str, Any]:
    """A folder of tiny tiles (28 pixels, 4 tokens), and its manifest."""
    settings: dict[str, Any] = {
        "vocab_size": 300, "tile_size": 28, "max_tiles_per_side": 3, "max_tiles": 6,
        "num_workers": 1, "validation_fraction": 0.0, "max_tokens": 256,
        "max_rejected_fraction": 1.0,
    }  # fmt: skip
    config = PrepareImagesConfig(input=input, output=str(output), **(settings | options))
    return prepare_images(config, console=Console(quiet=True))
