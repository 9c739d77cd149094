"""Prepared folders made from token lists, without a tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fulmen.data.reading import Chunk
from fulmen.data.shards import FORMAT_VERSION, SPLITS
from fulmen.data.tokenise import EncodedChunk
from fulmen.data.writing import ShardWriter, as_json

MakeFolder = Callable[..., Path]


def write_folder(
    path: Path,
    train: Sequence[Sequence[int]],
    valid: Sequence[Sequence[int]] = (),
    *,
    vocab_size: int = 1000,
    num_shards: int = 1,
    dtype: str = "uint16",
    tokenizer_sha256: str = "0",
) -> Path:
    """A prepared folder that holds exactly these documents, in this order."""
    progress = path / ".progress"
    progress.mkdir(parents=True)
    documents = [(list(one), False) for one in train] + [(list(one), True) for one in valid]
    records = []
    for number in range(num_shards):
        part = [one for place, one in enumerate(documents) if place % num_shards == number]
        part.sort(key=lambda one: one[1])
        writer = ShardWriter(number, output=path, progress=progress, dtype=dtype)
        encoded = EncodedChunk(
            tokens=np.array([token for one, _ in part for token in one], dtype=dtype),
            lengths=np.array([len(one) for one, _ in part], dtype=np.int64),
            valid=np.array([is_valid for _, is_valid in part], dtype=np.bool_),
            reasons={},
        )
        rows = list(range(1, len(part) + 1))
        chunk = Chunk("lines", [0] * len(part), rows, [], 0)
        writer.add(chunk, encoded, 0, len(part), files=[])
        records.append(writer.close())
    splits = {}
    for split in SPLITS:
        parts = [record["splits"][split] for record in records if split in record["splits"]]
        splits[split] = {
            "documents": sum(part["documents"] for part in parts),
            "tokens": sum(part["tokens"] for part in parts),
            "shards": parts,
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"file": "tokenizer.json", "sha256": tokenizer_sha256},
        "vocab_size": vocab_size,
        "dtype": dtype,
        "splits": splits,
    }
    (path / "manifest.json").write_bytes(as_json(manifest))
    return path
