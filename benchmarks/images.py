"""Time the image side of the data room: from the bytes of a file to uint8 tiles, on one core.

python benchmarks/images.py [--seconds 2] [--workers 2]

Each format and size is decoded and cut for some seconds in this process, the best of three rounds
counts; then all together through the decoding processes of the loader. Pictures are smooth colours
with noise, which compress about as photographs do.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fulmen.data.image_decoding import ImageDecoder, TileJob
from fulmen.data.image_shards import StoredImage
from fulmen.data.images import ImageLimits, cut_tiles, decode_image
from fulmen.models.image_layout import RELEASED, image_layout

SIZES = [(336, 336), (640, 480), (1280, 720), (1920, 1080), (4000, 3000)]
FORMATS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"quality": 90}}
LIMITS = ImageLimits()


def photograph(width: int, height: int) -> Image.Image:
    """Large soft shapes, small ones, and a little noise."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for cells, weight in ((4, 0.6), (40, 0.3), (200, 0.1)):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    total += rng.normal(0, 3, total.shape)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **FORMATS[kind])
    return buffer.getvalue()


def time_one(data: bytes, seconds: float) -> tuple[float, float]:
    """Seconds to decode, and to resize and cut, one image: the best of three rounds."""
    best = (float("inf"), float("inf"))
    for _ in range(3):
        decoding = cutting = 0.0
        rounds, end = 0, time.process_time() + seconds / 3
        while time.process_time() < end or not rounds:
            begin = time.process_time()
            image = decode_image(data, LIMITS)
            middle = time.process_time()
            cut_tiles(image, image_layout(*image.size))
            decoding += middle - begin
            cutting += time.process_time() - middle
            rounds += 1
        best = min(best, (decoding / rounds, cutting / rounds), key=sum)
    return best


def time_workers(files: list[bytes], num_workers: int, seconds: float) -> float:
    """Tiles per second of all files in turn through the loader's processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images")
        path.write_bytes(b"".join(files))
        jobs, offset = [], 0
        for data in files:
            size = decode_image(data, LIMITS).size
            layout = image_layout(*size)
            stored = StoredImage(str(path), offset, len(data), 0, *size, layout)
            jobs.append(TileJob(stored, 0, layout.num_tiles))
            offset += len(data)
        decoder = ImageDecoder(num_workers)
        for _ in decoder.tiles(jobs * num_workers):
            pass  # the processes start
        begin, tiles = time.perf_counter(), 0
        while time.perf_counter() < begin + seconds:
            tiles += sum(len(pixels) for pixels, _ in decoder.tiles(jobs * 2))
        elapsed = time.perf_counter() - begin
        decoder.close()
    return tiles / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each format and size")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    arguments = parser.parse_args()
    print("| format | size | KB | tiles | decode ms | resize and cut ms | tiles/s per core |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    files = []
    for kind in FORMATS:
        for width, height in SIZES:
            data = encode(photograph(width, height), kind)
            files.append(data)
            decoding, cutting = time_one(data, arguments.seconds)
            tiles = image_layout(width, height, RELEASED).num_tiles
            print(
                f"| {kind} | {width} x {height} | {len(data) / 1024:.0f} | {tiles} "
                f"| {decoding * 1e3:.1f} | {cutting * 1e3:.1f} "
                f"| {tiles / (decoding + cutting):.0f} |",
                flush=True,
            )
    rate = time_workers(files, arguments.workers, 3 * arguments.seconds)
    print(f"all of them through {arguments.workers} processes of the loader: {rate:.0f} tiles/s")


if __name__ == "__main__":
    main()
