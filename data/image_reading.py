"""Read records with images: webdataset tars, parquet, and jsonl beside image files.

A record is only gathered here; a worker process parses it. A damaged archive gives one rejected
record and costs what lies behind the damage, not the run.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulmen.data.conversations import ALIASES, FIELDS, RecordError
from fulmen.data.reading import InputFile, read_lines

SUFFIXES = [".tar", ".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"]
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TEXT_ENDINGS = (".txt", ".caption")
_PARQUET_ROWS = 16
_BLOCK_BYTES = 2**20
# Records of one task of a worker: enough to hide its cost, few enough that all that are under way,
# images of a jsonl included, can be held in memory.
_CHUNK_RECORDS, _CHUNK_BYTES = 16, 16 * 2**20


@dataclass(frozen=True)
class RawRecord:
    """One record as it stands in the input, with what names it."""

    file: int
    row: int
    """Line, row or sample of its file, from 1."""
    name: str = ""
    """Key of a sample of a tar."""
    line: bytes | None = None
    """JSON to be parsed: a line of jsonl, or the .json of a sample."""
    caption: bytes | None = None
    """The .txt of a sample."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Columns of a parquet row."""
    members: dict[str, bytes] = field(default_factory=dict)
    """Images of a sample, by name."""
    folder: str | None = None
    """Where the paths of images begin, for jsonl."""
    problem: tuple[str, str] | None = None
    """Kind and reason, where the record cannot even be read."""


@dataclass(frozen=True)
class ReadLimits:
    """What is read at all."""

    max_bytes: int
    """Of one image or text of a record."""
    names: Mapping[str, str]
    """Names that the input has for some of FIELDS."""


def read_records(
    files: Sequence[InputFile], limits: ReadLimits, *, start: tuple[int, int] = (0, 0)
) -> Iterator[list[RawRecord]]:
    """All records in order, in chunks, from place `start`: (file number, records passed)."""
    chunk: list[RawRecord] = []
    held = 0
    for number in range(start[0], len(files)):
        passed = start[1] if number == start[0] else 0
        for record in _file_records(files[number], number, limits):
            if record.row <= passed:
                continue
            chunk.append(record)
            held += sum(map(len, record.members.values())) + len(record.line or b"")
            held += sum(len(one) for one in _values_bytes(record.fields))
            if len(chunk) >= _CHUNK_RECORDS or held >= _CHUNK_BYTES:
                yield chunk
                chunk, held = [], 0
    if chunk:
        yield chunk


def _values_bytes(fields: Mapping[str, Any]) -> Iterator[bytes]:
    for value in fields.values():
        for one in value if isinstance(value, list) else [value]:
            data = one.get("bytes") if isinstance(one, dict) else one
            if isinstance(data, bytes):
                yield data


def _file_records(file: InputFile, number: int, limits: ReadLimits) -> Iterator[RawRecord]:
    row = 0
    try:
        if file.path.endswith(".tar"):
            records = _tar_records(file.path, number, limits)
        elif file.kind == "parquet":
            records = _parquet_records(file.path, number)
        else:
            folder = os.path.dirname(os.path.abspath(file.path))
            records = (
                RawRecord(number, place, line=line, folder=folder)
                for place, line in enumerate(read_lines(file), 1)
                if line.strip()
            )
        for record in records:
            row = record.row
            yield record
    except Exception as error:  # tarfile, zlib, arrow and the system each have their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        yield RawRecord(number, row + 1, problem=("damaged_file", f"after record {row}: {reason}"))


def _tar_records(path: str, number: int, limits: ReadLimits) -> Iterator[RawRecord]:
    """Samples of a webdataset: neighbouring members with one name up to the first dot."""
    row, key, members = 0, None, {}
    problem: tuple[str, str] | None = None
    # "r|", a stream: nothing is read twice, and no list of members grows.
    with tarfile.open(path, "r|", ignore_zeros=False) as archive:
        for member in archive:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if not stem or folder.startswith("__MACOSX"):
                continue
            name = f"{folder}/{stem}" if folder else stem
            if key is not None and name != key:
                row += 1
                yield _sample(number, row, key, members, problem)
                members, problem = {}, None
            key = name
            if member.size > limits.max_bytes:
                problem = ("too_many_bytes", f"{member.name} has {member.size} bytes")
                continue
            opened = archive.extractfile(member)
            assert opened is not None
            data = opened.read()
            if len(data) != member.size:
                raise tarfile.ReadError(f"{member.name} ends early")
            members[f".{ending}" if ending else ""] = data
        end = archive.offset
    if key is not None:
        yield _sample(number, row + 1, key, members, problem)
    _check_end(path, end)


def _check_end(path: str, end: int) -> None:
    """`tarfile.ReadError` if there is more behind an archive's last member than its padding.

    tarfile takes a damaged header for the end.
    """
    with open(path, "rb") as file:
        file.seek(end)
        while block := file.read(_BLOCK_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"no header of a member at byte {end}")


def _sample(
    file: int, row: int, key: str, members: dict[str, bytes], problem: tuple[str, str] | None
) -> RawRecord:
    lowered = {ending.lower(): data for ending, data in members.items()}
    texts = [data for ending, data in lowered.items() if ending.endswith(_TEXT_ENDINGS)]
    return RawRecord(
        file,
        row,
        name=key,
        line=lowered.get(".json"),
        caption=texts[0] if texts else None,
        members={name: data for name, data in members.items() if _is_image(name)},
        problem=problem,
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGE_ENDINGS)


def _parquet_records(path: str, number: int) -> Iterator[RawRecord]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for fields in batch.to_pylist():
                row += 1
                yield RawRecord(number, row, fields=fields)


def raw_fields(raw: RawRecord) -> dict[str, Any]:
    """A record's fields as they stand; RecordError where it cannot be read."""
    if raw.problem:
        raise RecordError(*raw.problem)
    fields = dict(raw.fields)
    if raw.line is not None:
        fields = _json_object(raw.line)
    elif raw.caption is not None:
        try:
            fields = {"text": raw.caption.decode("utf-8")}
        except UnicodeDecodeError as error:
            raise RecordError("bad_utf8", f"invalid UTF-8 at byte {error.start}") from None
    return fields


def read_fields(raw: RawRecord, limits: ReadLimits) -> tuple[dict[str, Any], list[bytes]]:
    """A record's fields by our names, and its images' bytes; RecordError for what is amiss."""
    fields = raw_fields(raw)
    ours = {alias: name for alias, name in ALIASES.items() if name not in fields}
    ours |= {given: name for name, given in limits.names.items()}
    fields = {ours.get(name, name): value for name, value in fields.items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in FIELDS}
    if not fields and not raw.members:
        raise RecordError("empty_record", "nothing in it is known")
    return fields, read_images(raw, fields, limits)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise RecordError("bad_utf8", f"invalid UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RecordError("bad_json", str(error)[:200]) from None
    if not isinstance(value, dict):
        raise RecordError("wrong_type", f"a JSON {type(value).__name__}, not an object")
    return value


def read_images(raw: RawRecord, fields: Mapping[str, Any], limits: ReadLimits) -> list[bytes]:
    """The bytes of a record's images, from `image` or `images` of its fields, or of its sample."""
    given = fields.get("images", fields.get("image"))
    if given is None:
        # .2.jpg before .10.jpg
        images = [raw.members[name] for name in sorted(raw.members, key=lambda n: (len(n), n))]
    else:
        entries = given if isinstance(given, list) else [given]
        images = [_one_image(raw, entry, limits) for entry in entries]
    for data in images:
        if len(data) > limits.max_bytes:
            raise RecordError("too_many_bytes", f"an image of {len(data)} bytes")
    return images


def _one_image(raw: RawRecord, entry: Any, limits: ReadLimits) -> bytes:
    if isinstance(entry, dict):
        entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
    if isinstance(entry, bytes):
        return entry
    if entry is None:
        raise RecordError("missing_image", "an image is null")
    if not isinstance(entry, str):
        raise RecordError("wrong_type", f"an image is {type(entry).__name__}")
    if raw.folder is not None:
        return _read_file(raw.folder, entry, limits)
    # A member by its ending alone ("0.jpg"), or by its whole name.
    stem, _, ending = os.path.basename(entry).partition(".")
    names = [f".{entry.removeprefix('.')}"]
    if stem == os.path.basename(raw.name):
        names.append(f".{ending}")
    for name in names:
        if name in raw.members:
            return raw.members[name]
    raise RecordError("missing_image", f"image {entry[:80]!r} is not in the sample")


def _read_file(folder: str, entry: str, limits: ReadLimits) -> bytes:
    path = Path(folder, entry)
    if "\0" in entry or not Path(os.path.normpath(path)).is_relative_to(folder):
        raise RecordError("missing_image", f"image {entry[:80]!r} is outside its folder")
    try:
        if path.stat().st_size > limits.max_bytes:
            raise RecordError("too_many_bytes", f"{entry[:80]} has {path.stat().st_size} bytes")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise RecordError("missing_image", f"{entry[:80]}: {error.strerror}") from None
