"""Preparing documents with images: every kind of input, the same bytes again, and clear errors."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.pictures import encoded, picture, prepare, write_jsonl, write_tar

from fulmen.data import image_writing
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer

PICTURES = [encoded(picture(20 + n, 30, seed=n)) for n in range(24)]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def documents(folder: Path, split: str = "train") -> list[tuple[list[int], list[bytes]]]:
    """Tokens and images of every document."""
    opened = PreparedSplit(folder, split, name="x", vocab_size=300)
    assert opened.images is not None
    found = []
    for number in range(opened.num_documents):
        (shard,), (place,) = opened.places(np.array([number]))
        blobs = []
        for image in opened.images.images(int(shard), int(place)):
            data = Path(image.path).read_bytes()
            blobs.append(data[image.offset : image.offset + image.num_bytes])
        found.append((opened.document(number).tolist(), blobs))
    return found


@pytest.fixture
def same_input(tmp_path: Path) -> dict[str, Path]:
    """The same captions in every form."""
    members: dict[str, bytes] = {}
    lines, rows = [], []
    (tmp_path / "files").mkdir()
    for number, data in enumerate(PICTURES):
        text = f"picture {number}"
        if number % 2:
            members |= {f"a/{number:03}.png": data, f"a/{number:03}.txt": text.encode()}
        else:
            record = {"caption": text, "image": "png"}
            members |= {
                f"a/{number:03}.png": data,
                f"a/{number:03}.json": json.dumps(record).encode(),
            }
        (tmp_path / "files" / f"{number}.png").write_bytes(data)
        lines.append({"text": text, "images": [f"{number}.png"]})
        rows.append({"bytes": data, "path": f"{number}.png"})
    texts = [line["text"] for line in lines]
    pq.write_table(pa.table({"text": texts, "image": rows}), tmp_path / "structs.parquet")
    plain = {"TEXT": texts, "picture": [[data] for data in PICTURES]}
    pq.write_table(pa.table(plain), tmp_path / "renamed.parquet")
    return {
        "tar": write_tar(tmp_path / "x.tar", members),
        "jsonl": write_jsonl(tmp_path / "files" / "x.jsonl", lines),
        "structs": tmp_path / "structs.parquet",
        "renamed": tmp_path / "renamed.parquet",
    }


def test_every_form_gives_the_same(tmp_path: Path, same_input: dict[str, Path]) -> None:
    wanted = None
    for name, path in same_input.items():
        fields = {"text": "TEXT", "images": "picture"} if name == "renamed" else {}
        manifest = prepare(str(path), tmp_path / name, fields=fields)
        assert (manifest["documents"], manifest["rejected"]) == (len(PICTURES), 0)
        got = documents(tmp_path / name)
        wanted = wanted or got
        assert got == wanted
    assert wanted is not None
    tokenizer = load_tokenizer(str(tmp_path / "tar" / "tokenizer.json"))
    ids = read_manifest(tmp_path / "tar")["special_ids"]
    for number, (tokens, blobs) in enumerate(wanted):
        assert blobs == [PICTURES[number]]
        text = [token for token in tokens if token != ids["image"]]
        assert tokens.index(text[0]) == len(tokens) - len(text)
        assert tokenizer.decode(text[:-1]) == f"picture {number}"


def test_killed_and_run_again(
    tmp_path: Path, same_input: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [str(path) for name, path in same_input.items() if name != "renamed"]
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n[]\n' + '{"text": "x"}\n' * 20)
    inputs.append(str(tmp_path / "bad.jsonl"))
    options = {"shard_tokens": 120, "validation_fraction": 0.3}
    prepare(inputs, tmp_path / "whole", **options)
    wanted = contents(tmp_path / "whole")
    assert sum(name.endswith(".img") for name in wanted) > 5
    close = image_writing.ImageShardWriter.close
    for limit in (1, 2, 4):
        count = itertools.count()

        def killed(
            self: Any, count: "itertools.count[int]" = count, limit: int = limit
        ) -> dict[str, Any]:
            if next(count) >= limit:
                raise KeyboardInterrupt
            return close(self)

        monkeypatch.setattr(image_writing.ImageShardWriter, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "cut", **options)
        assert not (tmp_path / "cut" / "manifest.json").exists()
    monkeypatch.setattr(image_writing.ImageShardWriter, "close", close)
    prepare(inputs, tmp_path / "cut", num_workers=2, **options)
    assert contents(tmp_path / "cut") == wanted
    prepare(inputs, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match=r"other settings: max_tokens \(256 there, 99 now\)"):
        prepare(inputs, tmp_path / "cut", max_tokens=99, **options)


def test_pictures_are_on_one_side(tmp_path: Path) -> None:
    """All questions about one picture are held out, or none."""
    lines = []
    for number, data in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(data)
        lines += [{"text": f"{word} {number}", "image": f"{number}.png"} for word in ("a", "b")]
    write_jsonl(tmp_path / "x.jsonl", lines)
    prepare(str(tmp_path / "x.jsonl"), tmp_path / "out", validation_fraction=0.4)
    train, valid = (documents(tmp_path / "out", split) for split in ("train", "valid"))
    assert len(train) + len(valid) == 2 * len(PICTURES)
    assert len(valid) > 4
    assert not {blobs[0] for _, blobs in train} & {blobs[0] for _, blobs in valid}


def test_many_images_of_a_sample_are_in_order(tmp_path: Path) -> None:
    members = {f"x.{n}.png": PICTURES[n] for n in (10, 2, 1, 0)} | {"x.txt": b"four"}
    prepare(str(write_tar(tmp_path / "x.tar", members)), tmp_path / "out")
    ((_, blobs),) = documents(tmp_path / "out")
    assert blobs == [PICTURES[n] for n in (0, 1, 2, 10)]


def test_fixed_resolution_is_one_tile_an_image(tmp_path: Path, same_input: dict[str, Path]) -> None:
    manifest = prepare(str(same_input["tar"]), tmp_path / "out", resolution="fixed")
    train = manifest["splits"]["train"]
    assert train["tiles"] == train["images"] == len(PICTURES)
    assert train["image_tokens"] == 4 * len(PICTURES)


def test_damage_is_seen(tmp_path: Path, same_input: dict[str, Path]) -> None:
    prepare(str(same_input["tar"]), tmp_path / "out")
    path = tmp_path / "out" / "train-00000.img"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00000.img is corrupt"):
        PreparedSplit(tmp_path / "out", "train", name="x", vocab_size=300)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="its manifest says"):
        PreparedSplit(tmp_path / "out", "train", name="x", vocab_size=300, verify=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "large"}, "resolution=large must be dynamic or fixed"),
        ({"tile_size": 30}, "tile_size=30 must be a multiple of patch_size=14"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"fields": {"pixels": "x"}}, "fields.pixels"),
        ({"vocab_size": 200}, "vocab_size=200"),
        ({"tokenizer": "nowhere"}, "nowhere does not exist"),
        ({"image_token": "<picture>"}, "no token image_token=<picture>"),
        ({"held_out": "x.tar"}, "every file is in held_out"),
    ],
)
def test_wrong_keys_are_named(
    tmp_path: Path, same_input: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    if "image_token" in options:
        prepare(str(same_input["tar"]), tmp_path / "first")
        options = options | {"tokenizer": str(tmp_path / "first")}
    if "held_out" in options:
        options = {"held_out": str(same_input["tar"])}
    with pytest.raises(ValueError, match=message):
        prepare(str(same_input["tar"]), tmp_path / "out", **options)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PICTURES[0])
    with pytest.raises(ValueError, match=r"x.png is none of .tar"):
        prepare(str(tmp_path / "x.png"), tmp_path / "out")
