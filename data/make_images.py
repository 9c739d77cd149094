"""Pictures of digits and words with captions, questions and pairs of answers, for those who have
no data: each is rendered by Pillow's own font, and nothing needs a download.

A record depends on the seed, its part and its number alone. Whether a text is held out depends on
the text alone, so what is asked there was never written in training.
"""

import hashlib
import importlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fulmen.data.config import MakeImagesConfig

COLOURS = {
    "black": (20, 20, 20), "red": (200, 30, 30), "green": (20, 130, 40), "blue": (30, 60, 200),
    "purple": (130, 40, 150), "brown": (120, 70, 20),
}  # fmt: skip
KINDS = ("digits", "words", "handwritten")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_FORMATS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("png", "PNG", {}),
    ("jpg", "JPEG", {"quality": 90}),
    ("webp", "WEBP", {"quality": 90}),
)
# One text in this many is held out.
_HELD_OUT_OF = 10
Members = dict[str, bytes]


def make_images(config: MakeImagesConfig) -> dict[str, int]:
    """Write `output`/{captions,conversations,pairs,labelled}/*.tar; the records of each file."""
    _check(config)
    written = {}
    for part, make in _PARTS.items():
        for held_out in (False, True):
            count = config.held_out if held_out else getattr(config, part)
            if held_out and part == "labelled":
                continue
            for first in range(0, count, config.shard_records):
                last = min(first + config.shard_records, count)
                name = f"{'held_out' if held_out else 'train'}-{first // config.shard_records:05d}"
                path = Path(config.output, part, f"{name}.tar")
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_tar(path, _records(config, part, make, held_out, first, last))
                written[str(path)] = last - first
    return written


def _check(config: MakeImagesConfig) -> None:
    if Path(config.output).exists() and any(Path(config.output).iterdir()):
        raise ValueError(f"output={config.output} is not empty: give a new folder")
    unknown = [kind for kind in config.kinds if kind not in KINDS]
    if unknown or not config.kinds:
        raise ValueError(f"kinds={config.kinds}: give some of {', '.join(KINDS)}")
    for key in ("width", "height", "letters"):
        value = getattr(config, key)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"{key}={value}: give the least and the most")
    if min(config.width[0], config.height[0]) < 16:
        raise ValueError(f"width={config.width}, height={config.height}: 16 pixels are the least")
    if not 0 <= config.text_pairs <= 1:
        raise ValueError(f"text_pairs={config.text_pairs} must be in [0, 1]")
    if "handwritten" in config.kinds:
        _handwritten()


def _records(
    config: MakeImagesConfig,
    part: str,
    make: Callable[["_Maker"], Members],
    held_out: bool,
    first: int,
    last: int,
) -> Iterator[Members]:
    for number in range(first, last):
        words = f"{config.seed}/{part}/{held_out}/{number}".encode()
        seed = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
        made = make(_Maker(config, np.random.default_rng(seed), held_out))
        yield {f"{number:08d}.{ending}": data for ending, data in made.items()}


def _write_tar(path: Path, records: Iterator[Members]) -> None:
    with tarfile.open(path, "w") as archive:
        for members in records:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


class _Maker:
    """Draws the parts of one record."""

    def __init__(self, config: MakeImagesConfig, rng: np.random.Generator, held_out: bool) -> None:
        self.config, self.rng, self.held_out = config, rng, held_out

    def choose(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def between(self, bounds: list[int]) -> int:
        return int(self.rng.integers(bounds[0], bounds[1] + 1))

    def text(self, kind: str) -> str:
        """A number or a word of the right side."""
        for _ in range(10_000):
            size = self.between(self.config.letters)
            if kind == "words":
                letters = [self.choose((_CONSONANTS, _VOWELS)[n % 2]) for n in range(size)]
            else:
                letters = [self.choose("0123456789") for _ in range(size)]
            text = "".join(letters)
            if is_held_out(text) == self.held_out:
                return text
        raise ValueError(f"letters={self.config.letters}: too few texts to hold some out")

    def picture(self) -> "_Picture":
        kind = self.choose(self.config.kinds)
        return _Picture(self, kind, self.text(kind), self.choose(list(COLOURS)))


class _Picture:
    """A rendered text, what it says and in which colour."""

    def __init__(self, maker: _Maker, kind: str, text: str, colour: str) -> None:
        self.text, self.colour = text, colour
        self.noun = "word" if kind == "words" else "number"
        size = maker.between(maker.config.width), maker.between(maker.config.height)
        paper = tuple(int(one) for one in maker.rng.integers(225, 256, 3))
        image = Image.new("RGB", size, paper)
        mask = (
            _written(text, size) if kind != "handwritten" else _written_by_hand(maker, text, size)
        )
        left = int(maker.rng.integers(0, size[0] - mask.width + 1))
        top = int(maker.rng.integers(0, size[1] - mask.height + 1))
        image.paste(COLOURS[colour], (left, top), mask)
        self.ending, name, options = maker.choose(_FORMATS)
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        self.data = buffer.getvalue()


def _written(text: str, size: tuple[int, int]) -> Image.Image:
    """The text as a mask as large as fits in 90 % of a size."""
    font = ImageFont.load_default(48)
    left, top, right, bottom = (int(one) for one in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    return _fitted(mask, size)


def _fitted(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = min(0.9 * size[0] / mask.width, 0.9 * size[1] / mask.height)
    fitted = max(1, int(mask.width * scale)), max(1, int(mask.height * scale))
    return mask.resize(fitted, Image.Resampling.BICUBIC)


def _written_by_hand(maker: _Maker, text: str, size: tuple[int, int]) -> Image.Image:
    """The digits of scikit-learn side by side."""
    pictures, labels = _handwritten()
    glyphs = [maker.choose(pictures[labels == int(digit)]) for digit in text]
    mask = Image.fromarray((np.concatenate(glyphs, 1) / 16 * 255).astype(np.uint8))
    return _fitted(mask, size)


def _handwritten() -> tuple[Any, Any]:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise ValueError(
            "kinds: handwritten needs scikit-learn: pip install scikit-learn"
        ) from None
    digits = datasets.load_digits()
    return digits.images, digits.target


def is_held_out(text: str) -> bool:
    """Whether a text is only asked for, and never written in training."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_OF == 0


def _with_record(pictures: list[_Picture], record: dict[str, Any]) -> Members:
    members = {f"{place}.{picture.ending}": picture.data for place, picture in enumerate(pictures)}
    if pictures:
        record["images"] = list(members)
    return members | {"json": json.dumps(record).encode()}


def _caption(maker: _Maker) -> Members:
    picture = maker.picture()
    text = f"the {picture.noun} {picture.text} in {picture.colour}"
    return {picture.ending: picture.data, "txt": text.encode()}


def _labelled(maker: _Maker) -> Members:
    """For classification: as the text is one of captions, the picture is what was not seen."""
    picture = maker.picture()
    return {picture.ending: picture.data, "txt": picture.text.encode()}


def _conversation(maker: _Maker) -> Members:
    """One or two pictures, each asked for one or two things, first by first."""
    pictures = [maker.picture() for _ in range(1 + int(maker.rng.random() < 0.25))]
    messages = []
    for picture in pictures:
        asked = [("what is written?", picture.text), ("which colour?", picture.colour)]
        if maker.rng.random() < 0.5:
            asked = asked[:1]
        for number, (question, answer) in enumerate(asked):
            begin = "" if number else "<image>"
            messages.append({"role": "user", "content": begin + question})
            messages.append({"role": "assistant", "content": answer})
    return _with_record(pictures, {"messages": messages})


def _pair(maker: _Maker) -> Members:
    """What is written, against the same with one letter wrong; some without a picture."""
    if maker.rng.random() < maker.config.text_pairs:
        text = maker.text("digits")
        record = {"prompt": f"repeat {text}", "chosen": text, "rejected": _misread(maker, text)}
        return _with_record([], record)
    picture = maker.picture()
    wrong = _misread(maker, picture.text)
    prompt = "<image>what is written?"
    return _with_record([picture], {"prompt": prompt, "chosen": picture.text, "rejected": wrong})


def _misread(maker: _Maker, text: str) -> str:
    at = int(maker.rng.integers(len(text)))
    alphabet = next(one for one in ("0123456789", _CONSONANTS, _VOWELS) if text[at] in one)
    return text[:at] + maker.choose(alphabet.replace(text[at], "")) + text[at + 1 :]


_PARTS = {
    "captions": _caption,
    "conversations": _conversation,
    "pairs": _pair,
    "labelled": _labelled,
}
