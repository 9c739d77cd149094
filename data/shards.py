"""Read a prepared folder: memory-mapped token shards, their index and the manifest."""

import contextlib
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fulmen.data.image_shards import ImageIndex

IntArray = npt.NDArray[np.int64]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
# Below this size every byte is checked at start; above it the sizes and the indexes only.
VERIFY_BELOW_BYTES = 2**30


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder; ValueError where there is no whole one."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        state = "is not whole (no manifest.json)" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"data folder {folder} {state}: run launch/prepare_data.py input=... output={folder}"
        )
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is not a manifest ({error!r}): prepare it anew"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / MANIFEST} has format_version {version}, this code reads "
            f"{FORMAT_VERSION}: run launch/prepare_data.py anew"
        )
    return manifest


class PreparedSplit:
    """One split of a prepared folder: any document by its number, 0 .. num_documents - 1.

    `name` is the source's key in data.sources, for messages. `verify` reads every byte and
    compares checksums; by default that is done below 1 GiB, and above it only the sizes of all
    files and the checksums of the indexes are compared. Ranks share that work: one of `num_parts`
    reads shards part, part + num_parts, ... Raises ValueError, naming the file or the key, for
    anything that is missing, empty, damaged, or outside the vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        name: str,
        vocab_size: int,
        verify: bool | None = None,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self.path, self.split, self.name = Path(path), split, name
        try:
            manifest = read_manifest(self.path)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}.path: {error}") from None
        entry = manifest["splits"].get(split, {"documents": 0, "tokens": 0, "shards": []})
        shards: list[dict[str, Any]] = entry["shards"]
        if not entry["documents"]:
            advice = (
                "prepare it with a larger validation_fraction"
                if split == "valid"
                else "prepare it from more text, or with a smaller validation_fraction"
            )
            raise ValueError(
                f"data.sources.{name}: split '{split}' of {self.path} has no documents: {advice}"
            )
        largest = max(shard["max_token_id"] for shard in shards)
        if largest >= vocab_size:
            raise ValueError(
                f"data.sources.{name}: {self.path} holds token id {largest}, outside "
                f"model.vocab_size={vocab_size}: set model.vocab_size to at least "
                f"{manifest['vocab_size']} or prepare the data with another tokenizer"
            )
        if verify is None:
            bulk = sum(shard["tokens_bytes"] + shard.get("images_bytes", 0) for shard in shards)
            verify = bulk < VERIFY_BELOW_BYTES
        for number, shard in enumerate(shards):
            own = number % num_parts == part
            whole = own and verify
            for kind in (key.removesuffix("_file") for key in shard if key.endswith("_file")):
                checked = own if "index" in kind else whole
                file, size, sha256 = (shard[f"{kind}_{key}"] for key in ("file", "bytes", "sha256"))
                self._check(file, size, sha256, checked)

        _allow_open_files()
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.vocab_size = vocab_size
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        # See buckets.length_histogram; folders of an earlier fulmen have none.
        self.histogram: list[dict[str, int]] | None = entry.get("lengths")
        # What the split holds, wherever it lies: equal fingerprint = equal documents by number.
        held = [dtype.name, *(shard["tokens_sha256"] for shard in shards)]
        held += [shard["index_sha256"] for shard in shards]
        for kind in ("mask", "images", "image_index", "documents_index"):
            held += [shard[f"{kind}_sha256"] for shard in shards if f"{kind}_sha256" in shard]
        self.fingerprint = hashlib.sha256(" ".join(held).encode()).hexdigest()[:16]
        # Plain views of the maps: slicing a np.memmap costs several times as much.
        self.tokens = [
            np.asarray(np.memmap(self.path / shard["tokens_file"], dtype=dtype, mode="r"))
            for shard in shards
        ]
        self.offsets = [
            np.asarray(np.load(self.path / shard["index_file"], mmap_mode="r")) for shard in shards
        ]
        self._first = np.cumsum([0, *(shard["documents"] for shard in shards)])
        # What launch/prepare_images.py adds; None where every token has a label and none an image.
        self.images = ImageIndex(self.path, manifest, split) if "tiling" in manifest else None

    def _check(self, file: str, size: int, sha256: str, whole: bool) -> None:
        path = self.path / file
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes, its manifest says {size}"
        elif whole and file_sha256(path) != sha256:
            problem = "is corrupt (its checksum is not the manifest's)"
        else:
            return
        raise ValueError(
            f"data.sources.{self.name}: shard {path} {problem}: remove {self.path} and run "
            "launch/prepare_data.py anew, or copy the folder again"
        )

    def locate(self, documents: IntArray) -> tuple[list[int], list[int]]:
        """Shard number and first token's offset in that shard of each document."""
        shards, places = self.places(documents)
        numbers: list[int] = shards.tolist()
        offsets = self.offsets
        return numbers, [int(offsets[s][i]) for s, i in zip(numbers, places.tolist(), strict=True)]

    def places(self, documents: IntArray) -> tuple[IntArray, IntArray]:
        """Shard number, and place in that shard, of each document."""
        shards = np.searchsorted(self._first, documents, side="right") - 1
        return shards, documents - self._first[shards]

    def lengths(self, documents: IntArray) -> list[int]:
        """Tokens, end-of-document token included, of each document."""
        shards, places = self.places(documents)
        offsets = self.offsets
        return [
            int(offsets[s][i + 1]) - int(offsets[s][i])
            for s, i in zip(shards.tolist(), places.tolist(), strict=True)
        ]

    def document(self, number: int) -> npt.NDArray[Any]:
        """The token ids of one document."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents} in {self.path}")
        one = np.array([number])
        (shard,), (offset,) = self.locate(one)
        (length,) = self.lengths(one)
        return self.tokens[shard][offset : offset + length]


def _allow_open_files() -> None:
    """Each map holds a file open, and the usual soft limit, 1024, is for those of all sources."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems have a limit below theirs
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
