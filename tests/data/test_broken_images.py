"""Broken images and records are counted and named, and nothing else is lost."""

import io
import json
import struct
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.pictures import encoded, picture, prepare, write_jsonl, write_tar

from fulmen.data.image_reading import ReadLimits, read_records
from fulmen.data.images import ImageError, ImageLimits, decode_image
from fulmen.data.reading import InputFile
from fulmen.data.shards import PreparedSplit

GOOD = encoded(picture(), "JPEG")


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes whose header claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return encoded(picture())[:8] + chunk + encoded(picture())[33:]


def bomb() -> bytes:
    """Real pixels: 64 million of them in some tens of kilobytes."""
    return encoded(Image.new("L", (8000, 8000)), "PNG", optimize=True)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(255 - one for one in data[at : at + 40]) + data[at + 40 :]


def record(**more: Any) -> dict[str, Any]:
    return {"text": "a caption", "image": "good.jpg"} | more


IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text_file": (b"this is no image at all", "not_an_image"),
    "html": (b"<html><body>404</body></html>", "not_an_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    "jpeg_truncated": (encoded(picture(200, 200), "JPEG")[:1500], "truncated"),
    "png_truncated": (encoded(picture(200, 200))[:3000], "truncated"),
    "webp_truncated": (encoded(picture(200, 200), "WEBP")[:300], "undecodable"),
    "header_alone": (GOOD[:4], "not_an_image"),
    "bad_checksum": (flipped(encoded(picture(90, 90)), 600), "undecodable"),
    "zero_wide": (png_claiming(0, 10), "zero_sized"),
    "huge_claim": (png_claiming(60000, 60000), "too_many_pixels"),
    "pillow_would_stop": (png_claiming(9000, 9000), "too_many_pixels"),
    "bomb": (bomb(), "too_many_pixels"),
    "long_line": (encoded(Image.new("RGB", (4000, 4))), "aspect_ratio"),
    "too_many_bytes": (b"\xff\xd8" + bytes(2 * 2**20), "too_many_bytes"),
    "gif_cut": (encoded(picture(), "GIF")[:-200], "truncated"),
}
"""Broken files and the kind under which each is counted."""
RECORDS: dict[str, tuple[Any, str]] = {
    "null_image": (record(image=None, images=[None]), "missing_image"),
    "no_such_file": (record(image="nowhere.jpg"), "missing_image"),
    "outside": (record(image="../../etc/passwd"), "missing_image"),
    "a_folder": (record(image="."), "missing_image"),
    "number_for_image": (record(image=7), "wrong_type"),
    "no_text": ({"image": "good.jpg"}, "no_text"),
    "blank_text": (record(text="  "), "no_text"),
    "number_for_text": (record(text=5), "wrong_type"),
    "empty_object": ({}, "empty_record"),
    "unknown_fields": ({"foo": 1}, "empty_record"),
    "a_list": ([1, 2], "wrong_type"),
    "text_alone": ({"text": "no image"}, "missing_image"),
    "too_many_places": (record(text="<image> and <image>"), "image_count"),
    "unknown_role": (record(messages=[{"role": "narrator", "content": "x"}]), "unknown_role"),
    "messages_string": (record(messages="hello"), "wrong_type"),
    "messages_of_strings": (record(messages=["hello"]), "wrong_type"),
    "no_messages": (record(messages=[]), "no_text"),
    "no_answer": (record(messages=[{"role": "user", "content": "why"}]), "no_answer"),
    "content_null": (record(messages=[{"role": "user", "content": None}]), "wrong_type"),
    "surrogate": (record(text="half \ud800"), "bad_utf8"),
    "too_long": (record(text="x y z " * 300), "too_long"),
    "pair_equal": (record(prompt="q", chosen="a", rejected="a"), "equal_pair"),
    "pair_half": (record(prompt="q", chosen="a"), "no_answer"),
    "pair_no_prompt": (record(chosen="a", rejected="b"), "no_text"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    """Everything broken, with a good record before and after each."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "good.jpg").write_bytes(GOOD)
    lines: list[str] = []
    for name, (data, _) in IMAGES.items():
        (folder / f"{name}.jpg").write_bytes(data)
        lines += [json.dumps(record(text="good")), json.dumps(record(image=f"{name}.jpg"))]
    for broken, _ in RECORDS.values():
        lines += [json.dumps(record(text="good")), json.dumps(broken)]
    lines += ["{not json", "", json.dumps(record(text="good"))]
    raw = "\n".join(lines).encode() + b'\n{"text": "\xff\xfe", "image": "good.jpg"}\n'
    (folder / "a.jsonl").write_bytes(raw)

    samples = {f"{n:02}.{ending}": data for n in range(20) for ending, data in (
        ("jpg", GOOD), ("txt", b"good"))}  # fmt: skip
    samples |= {"20.jpg": GOOD, "21.txt": b"alone", "22.cls": b"3", "23.json": b'["x"]'}
    samples |= {"24.jpg": GOOD, "24.json": b'{"text": "x", "image": "25.jpg"}', "25.png": b"no"}
    samples |= {
        "25.txt": b"x",
        "26.jpg": GOOD,
        "26.txt": b"\xff",
        "27.jpg": GOOD,
        "27.txt": b"good",
    }
    whole = write_tar(folder / "b.tar", samples).read_bytes()
    (folder / "c.tar").write_bytes(whole[: 1024 * 9 + 700])
    (folder / "d.tar").write_bytes(b"no archive" * 200)
    table = pa.table({"image": [GOOD, None, b"junk", GOOD], "caption": ["good", "x", "y", "good"]})
    pq.write_table(table, folder / "e.parquet")
    (folder / "f.parquet").write_bytes((folder / "e.parquet").read_bytes()[:200])
    manifest = prepare(str(folder), folder / "out", max_image_mb=1, num_workers=2)
    lines = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    return folder, manifest, rejected


def test_each_kind_is_counted_and_named(prepared: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, manifest, rejected = prepared
    by_line = {(Path(row["file"]).name, row["line"]): row for row in rejected}
    broken = [(name, kind) for source in (IMAGES, RECORDS) for name, (_, kind) in source.items()]
    assert len(broken) > 40
    for place, (name, kind) in enumerate(broken):
        row = by_line.pop(("a.jsonl", 2 * place + 2))
        assert row["kind"] == kind, (name, row)
        assert row["reason"]
    rest = {(file, line, row["kind"]) for (file, line), row in by_line.items()}
    last = 2 * len(broken)
    in_tar = [(21, "no_text"), (22, "missing_image"), (23, "empty_record"), (24, "wrong_type"),
              (25, "missing_image"), (26, "not_an_image"), (27, "bad_utf8")]  # fmt: skip
    assert rest == {
        ("a.jsonl", last + 1, "bad_json"),
        ("a.jsonl", last + 4, "bad_utf8"),
        *(("b.tar", line, kind) for line, kind in in_tar),
        ("c.tar", rows_before_damage(folder) + 1, "damaged_file"),
        ("d.tar", 1, "damaged_file"),
        ("e.parquet", 2, "missing_image"),
        ("e.parquet", 3, "not_an_image"),
        ("f.parquet", 1, "damaged_file"),
    }
    counted = manifest["rejected_by_kind"]
    assert sum(counted.values()) == manifest["rejected"] == len(rejected)
    for kind, count in counted.items():
        assert count == sum(row["kind"] == kind for row in rejected)
    named = {row["line"]: row["name"] for row in rejected if row["file"].endswith("b.tar")}
    assert named[21] == "20"


@pytest.mark.parametrize(("damage", "whole"), [("flipped", 10), ("zeroed", 10), ("added", 20)])
def test_a_tar_that_seems_to_end_is_named(tmp_path: Path, damage: str, whole: int) -> None:
    samples = {f"{n:02}.{ending}": b"x" * 600 for n in range(20) for ending in ("jpg", "txt")}
    data = bytearray(write_tar(tmp_path / "a.tar", samples).read_bytes())
    header = data.index(b"10.jpg")
    if damage == "flipped":
        data[header + 150] ^= 1  # of its checksum
    elif damage == "zeroed":
        data[header : header + 512] = bytes(512)
    else:  # cat a.tar a.tar
        data = data + data
    (tmp_path / "a.tar").write_bytes(data)
    files = [InputFile(str(tmp_path / "a.tar"), "tar", len(data))]
    records = list(chain.from_iterable(read_records(files, ReadLimits(max_bytes=1000, names={}))))
    assert [record.problem for record in records[:-1]] == [None] * whole
    assert records[-1].problem is not None
    assert records[-1].problem[0] == "damaged_file"
    assert f"after record {whole}: ReadError: no header" in records[-1].problem[1]


def rows_before_damage(folder: Path) -> int:
    """Samples that c.tar still holds whole, by the sizes of its members."""
    size, members = (folder / "c.tar").stat().st_size, -(-len(GOOD) // 512) + 1 + 2
    return (size // 512) // members


def test_nothing_else_is_lost(prepared: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, manifest, _ = prepared
    good = len(IMAGES) + len(RECORDS) + 1 + 21 + rows_before_damage(folder) + 2
    split = PreparedSplit(folder / "out", "train", name="x", vocab_size=300)
    assert manifest["documents"] == split.num_documents == good
    assert manifest["splits"]["train"]["images"] == good
    # All of them are the same document.
    first = split.document(0)
    assert all(np.array_equal(split.document(n), first) for n in range(good))


def test_what_only_looks_broken_is_taken(tmp_path: Path) -> None:
    image = picture()
    profile = encoded(image, "PNG", icc_profile=b"this is no profile")
    exif = encoded(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    frames = [image, picture(seed=1)]
    good = {
        "wrong_ending.jpg": encoded(image),
        "profile.png": profile,
        "exif.jpg": exif,
        "animated.gif": encoded(image, "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(image, "WEBP", save_all=True, append_images=frames[1:]),
        "trailing.jpg": encoded(image, "JPEG") + b"junk" * 50,
    }
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    lines = [{"text": "x", "image": name} for name in good]
    manifest = prepare(str(write_jsonl(tmp_path / "x.jsonl", lines)), tmp_path / "out")
    assert manifest["documents"] == len(good)
    assert manifest["rejected"] == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_noise_in_a_file_is_an_image_or_an_image_error(kind: str) -> None:
    """No codec, header or tag lets another exception out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    whole = encoded(picture(), kind, **options)
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for number in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        # Half of them in the header, where most of what is believed stands.
        reach = len(data) if number % 2 else min(200, len(data))
        places = rng.integers(0, reach, rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        try:
            image = decode_image(data.tobytes(), ImageLimits(max_pixels=10**6))
        except ImageError:
            outcomes[False] += 1
        else:
            assert image.mode == "RGB"
            outcomes[True] += 1
    assert outcomes[False] > 5


def test_too_much_broken_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(ValueError, match="no usable record"):
        prepare(str(path), tmp_path / "a")
    with pytest.raises(ValueError, match="max_rejected_fraction"):
        prepare(str(path), tmp_path / "b", max_rejected_fraction=0.5)


def test_pixels_of_a_kept_image_are_its_own(tmp_path: Path) -> None:
    """The bytes in the folder are those of the input."""
    (tmp_path / "good.jpg").write_bytes(GOOD)
    prepare(str(write_jsonl(tmp_path / "x.jsonl", [record()])), tmp_path / "out")
    split = PreparedSplit(tmp_path / "out", "train", name="x", vocab_size=300)
    assert split.images is not None
    (image,) = split.images.images(0, 0)
    data = Path(image.path).read_bytes()[image.offset : image.offset + image.num_bytes]
    assert data == GOOD
    assert Image.open(io.BytesIO(data)).size == (image.width, image.height) == (40, 30)
