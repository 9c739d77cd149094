"""Write shards of documents with images: beside tokens and index, a mask, an index of the images,
and the images' own bytes, as they came."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulmen.data.image_encoding import EncodedRecord
from fulmen.data.image_shards import DOCUMENT_COLUMNS, IMAGE_COLUMNS
from fulmen.data.reading import InputFile
from fulmen.data.shards import SPLITS
from fulmen.data.writing import TokenPart, as_json, write_whole


class ImageShardWriter:
    """One shard under work: a run of consecutive input records, of every split.

    `close` puts the files in place and returns the shard's record, as `ShardWriter.close` does.
    """

    def __init__(self, number: int, *, output: Path, progress: Path, dtype: str) -> None:
        self.number, self.tokens, self.bytes, self.documents = number, 0, 0, 0
        self.rejected: dict[str, int] = {}
        """Records that gave no document, by kind."""
        self._output, self._progress, self._dtype = output, progress, dtype
        self._parts: dict[str, _ImagePart] = {}
        self._rejected_lines: list[bytes] = []
        self._end: tuple[int, int] | None = None

    def add(self, record: EncodedRecord, *, files: Sequence[InputFile]) -> None:
        """Take the next record."""
        self._end = record.file, record.row
        if record.problem:
            kind, reason = record.problem
            self.rejected[kind] = self.rejected.get(kind, 0) + 1
            row = {"file": files[record.file].path, "line": record.row}
            if record.name:
                row["name"] = record.name
            row |= {"kind": kind, "reason": reason}
            self._rejected_lines.append(json.dumps(row, ensure_ascii=True).encode() + b"\n")
            return
        split = SPLITS[record.valid]
        if split not in self._parts:
            name = f"{split}-{self.number:05d}"
            self._parts[split] = _ImagePart(name, self._output, self._progress, self._dtype)
        self._parts[split].add(record)
        self.tokens += len(record.tokens)
        self.bytes += sum(map(len, record.blobs))
        self.documents += 1

    @property
    def empty(self) -> bool:
        """Whether no record came."""
        return self._end is None

    def close(self) -> dict[str, Any]:
        record = {
            "end": self._end,
            "documents": self.documents,
            "tokens": self.tokens,
            "rejected": sum(self.rejected.values()),
            "rejected_by_kind": dict(sorted(self.rejected.items())),
            "splits": {split: part.close() for split, part in self._parts.items()},
        }
        name, folder = f"{self.number:05d}", self._progress
        rejected = b"".join(self._rejected_lines)
        write_whole(folder / f"rejected-{name}.jsonl", rejected, temporary_folder=folder)
        write_whole(folder / f"shard-{name}.json", as_json(record), temporary_folder=folder)
        return record


class _ImagePart:
    """The files of one shard and split."""

    def __init__(self, name: str, output: Path, progress: Path, dtype: str) -> None:
        self._output, self._progress, self._name = output, progress, name
        self._tokens = TokenPart(name, output, progress, dtype)
        self._mask = _Stream(f"{name}.mask", output, progress)
        self._blobs = _Stream(f"{name}.img", output, progress)
        self._documents: list[tuple[int, ...]] = []
        self._images: list[tuple[int, ...]] = []

    def add(self, record: EncodedRecord) -> None:
        self._tokens.add(record.tokens, np.array([len(record.tokens)]))
        self._mask.write(record.learnt.tobytes())
        offsets = [self._blobs.write(data) for data in record.blobs]
        layouts = [image.layout for image in record.images]
        for image in record.images:
            row = {
                "document": len(self._documents),
                "first": image.first,
                "tokens": image.layout.num_tokens,
                "tiles": image.layout.num_tiles,
                "width": image.width,
                "height": image.height,
                "offset": offsets[image.blob],
                "bytes": len(record.blobs[image.blob]),
            }
            self._images.append(tuple(row[column] for column in IMAGE_COLUMNS))
        totals = {
            "labels": int(record.learnt.sum()),
            "chosen": record.chosen,
            "images": len(layouts),
            "tiles": sum(layout.num_tiles for layout in layouts),
            "image_tokens": sum(layout.num_tokens for layout in layouts),
        }
        self._documents.append(tuple(totals[column] for column in DOCUMENT_COLUMNS))

    def close(self) -> dict[str, Any]:
        images = np.array(self._images, "<i8").reshape(-1, len(IMAGE_COLUMNS))
        documents = np.array(self._documents, "<i8")
        sums = dict(zip(DOCUMENT_COLUMNS, documents.sum(0).tolist(), strict=True))
        del sums["chosen"]
        record = {
            **self._tokens.close(),
            **self._mask.close("mask"),
            **self._blobs.close("images"),
            **self._array("image_index", f"{self._name}.imx", images),
            **self._array("documents_index", f"{self._name}.dox", documents),
        }
        return record | sums | {"pairs": int((documents[:, 1] > 0).sum())}

    def _array(self, kind: str, name: str, values: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, values)
        data = buffer.getvalue()
        write_whole(self._output / name, data, temporary_folder=self._progress)
        sha256 = hashlib.sha256(data).hexdigest()
        return {f"{kind}_file": name, f"{kind}_bytes": len(data), f"{kind}_sha256": sha256}


class _Stream:
    """A file of pieces back to back, under a temporary name until it is whole."""

    def __init__(self, name: str, output: Path, progress: Path) -> None:
        self._name, self._output = name, output
        self._temporary = progress / f"{name}.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in close)
        self._hasher = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        """Append, and tell where it begins."""
        begin = self._size
        self._file.write(data)
        self._hasher.update(data)
        self._size += len(data)
        return begin

    def close(self, kind: str) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._output / self._name)
        return {
            f"{kind}_file": self._name,
            f"{kind}_bytes": self._size,
            f"{kind}_sha256": self._hasher.hexdigest(),
        }
