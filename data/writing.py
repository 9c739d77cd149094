"""Write shards: token and index files, each under a temporary name until it is whole."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulmen.data.reading import Chunk, InputFile
from fulmen.data.shards import SPLITS, IntArray
from fulmen.data.tokenise import EMPTY, REJECTED, EncodedChunk


def write_whole(path: Path, content: bytes, *, temporary_folder: Path) -> None:
    """Write a file so that it is never seen half written; both folders on one file system."""
    temporary = temporary_folder / f"{path.name}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def as_json(value: Any) -> bytes:
    """Indented JSON of fixed form: equal values give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


class ShardWriter:
    """One shard under work: a run of consecutive input documents, of every split.

    `close` puts the files in place and returns the shard's record, which names what was written
    and the place in the input, (file number, rows passed), where the next shard starts.
    """

    def __init__(self, number: int, *, output: Path, progress: Path, dtype: str) -> None:
        self.number, self.tokens, self.documents, self.rejected, self.empty = number, 0, 0, 0, 0
        self._output, self._progress, self._dtype = output, progress, dtype
        self._parts: dict[str, TokenPart] = {}
        self._rejected_lines: list[bytes] = []
        self._end: tuple[int, int] | None = None

    def add(
        self,
        chunk: Chunk,
        encoded: EncodedChunk,
        begin: int,
        stop: int,
        *,
        files: Sequence[InputFile],
    ) -> None:
        """Take rows begin .. stop - 1 of a chunk."""
        lengths = encoded.lengths[begin:stop]
        held = np.maximum(lengths, 0)
        first = int(np.maximum(encoded.lengths[:begin], 0).sum())
        tokens = encoded.tokens[first : first + int(held.sum())]
        for split, wanted in zip(SPLITS, (False, True), strict=True):
            mine = (held > 0) & (encoded.valid[begin:stop] == wanted)
            if not mine.any():
                continue
            if split not in self._parts:
                name = f"{split}-{self.number:05d}"
                self._parts[split] = TokenPart(name, self._output, self._progress, self._dtype)
            chosen = tokens[np.repeat(mine, held)] if mine.sum() < (held > 0).sum() else tokens
            self._parts[split].add(chosen, held[mine])
        for place in range(begin, stop):
            if place in encoded.reasons:
                line, reason = encoded.reasons[place]
                path = files[chunk.files[place]].path
                record = {"file": path, "line": line, "reason": reason}
                self._rejected_lines.append(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        self.tokens += len(tokens)
        self.documents += int((held > 0).sum())
        self.rejected += int((lengths == REJECTED).sum())
        self.empty += int((lengths == EMPTY).sum())
        self._end = chunk.files[stop - 1], chunk.rows[stop - 1]

    def close(self) -> dict[str, Any]:
        record = {
            "end": self._end,
            "documents": self.documents,
            "tokens": self.tokens,
            "rejected": self.rejected,
            "empty": self.empty,
            "splits": {split: part.close() for split, part in self._parts.items()},
        }
        name = f"{self.number:05d}"
        folder = self._progress
        rejected = b"".join(self._rejected_lines)
        write_whole(folder / f"rejected-{name}.jsonl", rejected, temporary_folder=folder)
        write_whole(folder / f"shard-{name}.json", as_json(record), temporary_folder=folder)
        return record


class TokenPart:
    """The token and index file of one shard and split."""

    def __init__(self, name: str, output: Path, progress: Path, dtype: str) -> None:
        self._name, self._output, self._progress = name, output, progress
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = open(progress / f"{name}.bin.tmp", "wb")  # noqa: SIM115 (closed in close)
        self._hasher = hashlib.sha256()
        self._lengths: list[IntArray] = []
        self._max_token_id = 0

    def add(self, tokens: npt.NDArray[Any], lengths: IntArray) -> None:
        data = tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hasher.update(data)
        self._lengths.append(lengths)
        self._max_token_id = max(self._max_token_id, int(tokens.max()))

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        tokens_file, index_file = f"{self._name}.bin", f"{self._name}.idx"
        os.replace(self._progress / f"{tokens_file}.tmp", self._output / tokens_file)
        lengths = np.concatenate(self._lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype("<i8")
        index = io.BytesIO()
        np.save(index, offsets)
        write_whole(self._output / index_file, index.getvalue(), temporary_folder=self._progress)
        return {
            "tokens_file": tokens_file,
            "tokens_bytes": int(offsets[-1]) * self._dtype.itemsize,
            "tokens_sha256": self._hasher.hexdigest(),
            "index_file": index_file,
            "index_bytes": len(index.getvalue()),
            "index_sha256": hashlib.sha256(index.getvalue()).hexdigest(),
            "documents": len(lengths),
            "tokens": int(offsets[-1]),
            "max_token_id": self._max_token_id,
        }
