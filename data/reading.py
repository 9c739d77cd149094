"""Read raw documents: from files, globs and folders to chunks of undecoded lines or files.

Lines stay bytes until a tokenising process decodes them, so one bad byte costs one line and
not the file. The text builder of `datasets` is not used for them: on compressed files it dies at
the first invalid byte whatever encoding is asked for, and it takes a lone carriage return for the
end of a line, which shifts line numbers. Its json builder dies at the first malformed line.
"""

import glob
import gzip
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Text in one task of a tokenising process: large enough to hide what a task costs, small enough
# that all processes end together.
CHUNK_BYTES = 512 * 1024
# Few, because a row may be a whole book.
_PARQUET_ROWS = 64
_ZSTD_BYTES = 2**14
"""Read at a time: they may hold a thousand times as many."""
_SIGNATURE_BYTES = 64 * 1024


@dataclass(frozen=True)
class InputFile:
    """One file of raw documents; kind is "jsonl", "parquet", "lines" or "whole"."""

    path: str
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class Chunk:
    """Raw documents in input order.

    `files` and `rows` tell where each of `raw` comes from: the file's number, and the line or
    row counted from 1. `input_bytes` is how much of the files on disk the chunk used up.
    """

    kind: str
    files: list[int]
    rows: list[int]
    raw: list[bytes | str | None]
    input_bytes: int


def list_input(
    inputs: Sequence[str], *, suffixes: Sequence[str], document_per: str, output: Path
) -> list[InputFile]:
    """All files that `inputs` (files, globs, folders) name, each once, sorted by path.

    Folders give the files that end in one of `suffixes`; hidden files and whatever lies in
    `output` are left out.
    """
    found: set[str] = set()
    for entry in inputs:
        if os.path.isfile(entry):
            matches = [entry]
        elif os.path.isdir(entry):
            matches = [path for path in _walk(entry) if path.endswith(tuple(suffixes))]
        else:
            matches = [path for path in glob.glob(entry, recursive=True) if os.path.isfile(path)]
        matches = [path for path in matches if not Path(path).resolve().is_relative_to(output)]
        if not matches:
            wanted = f" ending in {', '.join(suffixes)}" if os.path.isdir(entry) else ""
            raise ValueError(f"input={entry}: no file{wanted} found there")
        found.update(os.path.normpath(path) for path in matches)
    return [
        InputFile(path, _kind(path, document_per), os.path.getsize(path)) for path in sorted(found)
    ]


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _kind(path: str, document_per: str) -> str:
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "whole" if document_per == "file" else "lines"


def input_signature(files: Sequence[InputFile]) -> str:
    """A hash that tells one input from another by names, sizes, and both ends of each file.

    Reading everything twice would cost too much; the time of change is no part of it, so that
    copied files are still the same input.
    """
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(f"{os.path.basename(file.path)}\0{file.size_bytes}\0".encode())
        with open(file.path, "rb") as opened:
            hasher.update(opened.read(_SIGNATURE_BYTES))
            opened.seek(max(0, file.size_bytes - _SIGNATURE_BYTES))
            hasher.update(opened.read())
    return hasher.hexdigest()


def check_parquet(files: Sequence[InputFile], text_field: str) -> None:
    """ValueError unless every parquet file can be opened and has a string column `text_field`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        if file.kind != "parquet":
            continue
        try:
            schema = pq.read_schema(file.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file.path} is not a readable parquet file: {error}") from None
        if text_field not in schema.names:
            raise ValueError(
                f"{file.path} has no column text_field={text_field}; it has: "
                f"{', '.join(schema.names)}"
            )
        kind = schema.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{file.path}: column text_field={text_field} is {kind}, not string")


def read_chunks(
    files: Sequence[InputFile], *, text_field: str, start: tuple[int, int] = (0, 0)
) -> Iterator[Chunk]:
    """All raw documents in order, as chunks, from place `start`: (file number, rows passed)."""
    from datasets.io.generator import GeneratorDatasetInputStream

    kwargs = {"files": tuple(files), "text_field": text_field, "start": start}
    # Every builder leaves a lock file in its cache: keep them out of the user's.
    with tempfile.TemporaryDirectory() as cache:
        stream = GeneratorDatasetInputStream(
            _generate, cache_dir=cache, gen_kwargs=kwargs, streaming=True
        ).read()
        for example in stream:
            yield Chunk(**example)


def _generate(
    files: Sequence[InputFile], text_field: str, start: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    whole = _Collector("whole")
    for number in range(start[0], len(files)):
        file = files[number]
        passed = start[1] if number == start[0] else 0
        if file.kind == "whole":
            if not passed:
                whole.add(number, 1, _read_whole(file), file.size_bytes)
            if whole.full():
                yield whole.take()
            continue
        if whole.raw:
            yield whole.take()
        parts = _parquet_parts(file, text_field) if file.kind == "parquet" else _line_parts(file)
        row = input_bytes = 0
        for raw, used in parts:
            skip = min(max(0, passed - row), len(raw))
            rows = list(range(row + skip + 1, row + len(raw) + 1))
            row += len(raw)
            input_bytes += used
            if rows:
                yield {
                    "kind": file.kind,
                    "files": [number] * len(rows),
                    "rows": rows,
                    "raw": raw[skip:],
                    "input_bytes": input_bytes,
                }
                input_bytes = 0
    if whole.raw:
        yield whole.take()


class _Collector:
    """Gathers small whole files into one chunk."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._reset()

    def _reset(self) -> None:
        self.files: list[int] = []
        self.rows: list[int] = []
        self.raw: list[bytes] = []
        self.input_bytes = 0

    def add(self, file: int, row: int, raw: bytes, used: int) -> None:
        self.files.append(file)
        self.rows.append(row)
        self.raw.append(raw)
        self.input_bytes += used

    def full(self) -> bool:
        return self.input_bytes >= CHUNK_BYTES

    def take(self) -> dict[str, Any]:
        chunk = {
            "kind": self.kind,
            "files": self.files,
            "rows": self.rows,
            "raw": self.raw,
            "input_bytes": self.input_bytes,
        }
        self._reset()
        return chunk


def _decompressed(path: str, raw: BinaryIO) -> Iterator[bytes]:
    if path.endswith(".zst"):
        yield from _zstd_blocks(raw)
        return
    opened = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    while block := opened.read(CHUNK_BYTES):
        yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Of all frames of a file, for files made by several writers hold several.

    The library's stream ends in the middle of a frame as if the file were whole.
    """
    import zstandard

    frame = None
    while rest := raw.read(_ZSTD_BYTES):
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if block := frame.decompress(rest):
                yield block
            rest = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")


def _read_whole(file: InputFile) -> bytes:
    return b"".join(block for block, _ in _blocks(file))


def _blocks(file: InputFile) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of a file, each with the bytes of the file on disk it used up."""
    with open(file.path, "rb") as raw:
        before = 0
        try:
            for block in _decompressed(file.path, raw):
                after = raw.tell()
                yield block, after - before
                before = after
        except Exception as error:  # gzip, zlib and zstandard each have their own classes
            raise ValueError(
                f"{file.path} is damaged at byte {raw.tell()} ({error}): copy it again or "
                "leave it out of input"
            ) from None


def _line_parts(file: InputFile) -> Iterator[tuple[list[bytes], int]]:
    begun: list[bytes] = []
    used = 0
    for block, block_used in _blocks(file):
        used += block_used
        lines = block.split(b"\n")
        if len(lines) == 1:
            begun.append(block)
            continue
        lines[0] = b"".join([*begun, lines[0]])
        begun = [lines.pop()]
        yield lines, used
        used = 0
    last = b"".join(begun)
    if last:
        yield [last], used


def read_lines(file: InputFile) -> Iterator[bytes]:
    """The undecoded lines of a file."""
    for lines, _ in _line_parts(file):
        yield from lines


def _parquet_parts(
    file: InputFile, text_field: str
) -> Iterator[tuple[list[str | bytes | None], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    num_rows = max(1, pq.read_metadata(file.path).num_rows)
    with tempfile.TemporaryDirectory() as cache:
        stream = load_dataset(
            "parquet",
            data_files=[glob.escape(os.path.abspath(file.path))],
            columns=[text_field],
            batch_size=_PARQUET_ROWS,  # else as many as the first group has, and it may have none
            split="train",
            streaming=True,
            cache_dir=cache,
        )
        try:
            for table in stream.with_format("arrow").iter(batch_size=_PARQUET_ROWS):
                column = table.column(text_field)
                try:
                    texts = column.to_pylist()
                except UnicodeDecodeError:  # in one of them: whoever decodes them says which
                    texts = column.cast(pa.large_binary()).to_pylist()
                yield texts, file.size_bytes * len(texts) // num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.path} is damaged ({error}): copy it again or leave it out of input"
            ) from None
