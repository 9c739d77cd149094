"""Prepared folders: documents by number, and one clear error for each thing that can be wrong."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from support.folders import MakeFolder

from fulmen.data.shards import PreparedSplit

pytestmark = pytest.mark.fast


def documents(count: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 1000, generator.integers(1, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_by_number(make_folder: MakeFolder, num_shards: int, dtype: str) -> None:
    train = documents(20)
    path = make_folder("a", train, documents(3, 1), num_shards=num_shards, dtype=dtype)
    split = PreparedSplit(path, "train", name="a", vocab_size=1000)
    assert split.num_documents == 20
    assert split.num_tokens == sum(map(len, train))
    in_order = [one for number in range(num_shards) for one in train[number::num_shards]]
    assert [split.document(number).tolist() for number in range(20)] == in_order
    with pytest.raises(IndexError):
        split.document(20)


def test_missing_folder(tmp_path: Path) -> None:
    message = r"data.sources.web.path: data folder .* does not exist: run launch/prepare_data.py"
    with pytest.raises(ValueError, match=message):
        PreparedSplit(tmp_path / "none", "train", name="web", vocab_size=9)


def test_unfinished_folder(make_folder: MakeFolder) -> None:
    path = make_folder("a", documents(4))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not whole .*run launch/prepare_data.py"):
        PreparedSplit(path, "train", name="web", vocab_size=1000)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1'])
def test_broken_manifest(make_folder: MakeFolder, content: str) -> None:
    path = make_folder("a", documents(4))
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        PreparedSplit(path, "train", name="web", vocab_size=1000)


def test_later_format(make_folder: MakeFolder) -> None:
    path = make_folder("a", documents(4))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2"):
        PreparedSplit(path, "train", name="web", vocab_size=1000)


def test_empty_splits(make_folder: MakeFolder) -> None:
    path = make_folder("a", documents(4))
    with pytest.raises(ValueError, match=r"sources.web: split 'valid' .*validation_fraction"):
        PreparedSplit(path, "valid", name="web", vocab_size=1000)
    path = make_folder("b", [], documents(4))
    with pytest.raises(ValueError, match=r"sources.web: split 'train' .* has no documents"):
        PreparedSplit(path, "train", name="web", vocab_size=1000)


def test_token_outside_the_vocabulary(make_folder: MakeFolder) -> None:
    path = make_folder("a", [[1, 2, 700, 3]], vocab_size=701)
    PreparedSplit(path, "train", name="web", vocab_size=701)
    message = r"sources.web: .* token id 700, outside model.vocab_size=700: .* at least 701"
    with pytest.raises(ValueError, match=message):
        PreparedSplit(path, "train", name="web", vocab_size=700)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_corrupt_shard(make_folder: MakeFolder, suffix: str) -> None:
    path = make_folder("a", documents(20), num_shards=3)
    file = path / f"train-00001.{suffix}"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"shard .*train-00001.{suffix} is corrupt"):
        PreparedSplit(path, "train", name="web", vocab_size=1000)
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=rf"train-00001.{suffix} has \d+ bytes"):
        PreparedSplit(path, "train", name="web", vocab_size=1000, verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=rf"train-00001.{suffix} is missing"):
        PreparedSplit(path, "train", name="web", vocab_size=1000, verify=False)


def test_the_tokens_of_large_data_are_not_read_at_start(make_folder: MakeFolder) -> None:
    path = make_folder("a", documents(20))
    file = path / "train-00000.bin"
    flipped = bytearray(file.read_bytes())
    flipped[0] ^= 1
    file.write_bytes(flipped)
    PreparedSplit(path, "train", name="web", vocab_size=1000, verify=False)
    with pytest.raises(ValueError, match="corrupt"):
        PreparedSplit(path, "train", name="web", vocab_size=1000, verify=True)


def test_fingerprint_is_of_the_content(make_folder: MakeFolder) -> None:
    first = make_folder("a", documents(9))
    same = make_folder("b", documents(9))
    other = make_folder("c", documents(9, seed=1))
    prints = [
        PreparedSplit(path, "train", name="x", vocab_size=1000).fingerprint
        for path in (first, same, other)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_files_may_be_open_of_many_sources(make_folder: MakeFolder) -> None:
    folder = make_folder("a", [[1, 2, 3]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        PreparedSplit(folder, "train", name="x", vocab_size=10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
