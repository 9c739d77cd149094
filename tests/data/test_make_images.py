"""Rendered pictures: what is asked, the same bytes by seed, and nothing held out in training."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import prepare

from fulmen.data.config import MakeImagesConfig
from fulmen.data.make_images import COLOURS, is_held_out, make_images

SMALL = {"captions": 40, "conversations": 30, "pairs": 30, "held_out": 15, "shard_records": 25}


def made(folder: Path, **options: Any) -> dict[str, bytes]:
    make_images(MakeImagesConfig(output=str(folder), **(SMALL | options)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.tar")}


def samples(data: bytes) -> list[dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            found.setdefault(key, {})[ending] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return list(found.values())


def test_equal_by_seed_and_parts(tmp_path: Path) -> None:
    first = made(tmp_path / "a")
    assert made(tmp_path / "b") == first
    assert set(first) == {
        f"{part}/{name}.tar"
        for part, last in (("captions", 1), ("conversations", 1), ("pairs", 1))
        for name in ["held_out-00000", *(f"train-{n:05d}" for n in range(last + 1))]
    }
    assert (
        made(tmp_path / "c", seed=1)["captions/train-00000.tar"]
        != first["captions/train-00000.tar"]
    )
    # More records leave those before them as they are.
    more = made(tmp_path / "d", captions=45)
    left, right = (samples(one["captions/train-00001.tar"]) for one in (first, more))
    assert right[: len(left)] == left


def test_labelled_pictures_have_the_text_alone(tmp_path: Path) -> None:
    options = {"captions": 0, "conversations": 0, "pairs": 0, "held_out": 3}
    files = made(tmp_path / "a", **options, labelled=20, kinds=["digits"], letters=[1, 1])
    assert [name for name in files if "labelled" in name] == ["labelled/train-00000.tar"]
    texts = [sample["txt"].decode() for sample in samples(files["labelled/train-00000.tar"])]
    assert len(texts) == 20
    assert all(len(text) == 1 and text in "0123456789" for text in texts)
    assert not any(is_held_out(text) for text in texts)


def texts_of(sample: dict[str, bytes]) -> list[str]:
    """All that is written in the pictures of a sample."""
    if "txt" in sample:
        return [sample["txt"].decode().split()[2]]
    record = json.loads(sample["json"])
    if "chosen" in record:
        return [record["chosen"]]
    turns = [turn["content"] for turn in record["messages"]]
    return [answer for answer in turns[1::2] if answer not in COLOURS]


def test_nothing_held_out_is_written_in_training(tmp_path: Path) -> None:
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for name, data in made(tmp_path / "a").items():
        for sample in samples(data):
            texts = texts_of(sample)
            assert texts
            sides["held_out" in name].update(texts)
    assert all(is_held_out(text) for text in sides[True])
    assert not any(is_held_out(text) for text in sides[False])


def test_the_picture_shows_its_colour(tmp_path: Path) -> None:
    for sample in samples(made(tmp_path / "a", kinds=["digits"])["captions/train-00000.tar"]):
        colour = COLOURS[sample.pop("txt").decode().split()[-1]]
        (data,) = sample.values()
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
        near = np.abs(pixels - colour).max(-1) < 40
        assert 5 < near.sum() < near.size / 2


def test_wrong_answers_differ_by_one_letter(tmp_path: Path) -> None:
    with_picture = 0
    for sample in samples(made(tmp_path / "a")["pairs/train-00000.tar"]):
        record = json.loads(sample["json"])
        good, bad = record["chosen"], record["rejected"]
        assert len(good) == len(bad)
        assert sum(a != b for a, b in zip(good, bad, strict=True)) == 1
        with_picture += "images" in record
    assert 5 < with_picture < 25


def test_every_part_can_be_prepared(tmp_path: Path) -> None:
    made(tmp_path / "raw")
    tokenizer = "train"
    for part in ("captions", "conversations", "pairs"):
        source = tmp_path / "raw" / part
        manifest = prepare(
            str(source), tmp_path / part, held_out=str(source / "held_out*.tar"),
            tokenizer=tokenizer, max_tokens=512,
        )  # fmt: skip
        tokenizer = str(tmp_path / "captions")
        assert manifest["rejected"] == 0
        splits = manifest["splits"]
        assert splits["train"]["documents"] == SMALL[part]
        assert splits["valid"]["documents"] == SMALL["held_out"]
        assert splits["train"]["pairs"] == (SMALL["pairs"] if part == "pairs" else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["signs"]}, "kinds="),
        ({"letters": [3, 2]}, "letters="),
        ({"width": [4, 20]}, "width="),
        ({"text_pairs": 2.0}, "text_pairs="),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "a", **options)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        made(tmp_path / "b")


def test_texts_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulmen.data.make_images.is_held_out", lambda text: False)
    with pytest.raises(ValueError, match=r"letters=.*too few texts"):
        made(tmp_path / "a")


def test_handwritten_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert made(tmp_path / "a", kinds=["handwritten"])
