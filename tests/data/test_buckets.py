"""Documents by length: the histogram and the buckets against counting one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import MakeFolder

from fulmen.data import buckets as buckets_module
from fulmen.data.buckets import BUCKETS, LengthBuckets, check_length_bounds, length_histogram
from fulmen.data.shards import PreparedSplit

pytestmark = pytest.mark.fast
Shards = list[list[int]]


class FakeSplit:
    """What LengthBuckets looks at, of documents of these lengths in these shards."""

    def __init__(self, shards: Shards, histogram: bool) -> None:
        self.offsets = [np.cumsum([0, *shard]) for shard in shards]
        self.num_documents = sum(map(len, shards))
        self.num_tokens = sum(map(sum, shards))
        self.histogram = length_histogram(self.offsets) if histogram else None


def open_buckets(shards: Shards, bounds: tuple[int, int], histogram: bool) -> LengthBuckets:
    split: Any = FakeSplit(shards, histogram)
    return LengthBuckets(split, bounds)


shard_lists = st.lists(
    st.lists(st.integers(1, 70), min_size=1, max_size=20), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
@given(shard_lists)
def test_histogram(shards: Shards) -> None:
    lengths = [length for shard in shards for length in shard]
    rows = length_histogram([np.cumsum([0, *shard]) for shard in shards])
    assert [row["from"] for row in rows] == sorted({2 ** (n.bit_length() - 1) for n in lengths})
    for row in rows:
        held = [length for length in lengths if row["from"] <= length < 2 * row["from"]]
        assert row["documents"] == len(held)
        assert row["tokens"] == sum(held)


@settings(max_examples=200, deadline=None)
@given(shard_lists, st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_buckets(shards: Shards, bound: int, more: int, histogram: bool) -> None:
    bounds = (bound, bound + more)
    lengths = [length for shard in shards for length in shard]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "_BLOCK", 7)
        opened = open_buckets(shards, bounds, histogram)
    ranges = [(0, bounds[0]), bounds, (bounds[1], 10**9)]
    for bucket, (least, most) in enumerate(ranges):
        wanted = [number for number, length in enumerate(lengths) if least <= length < most]
        assert opened.num_documents[bucket] == len(wanted)
        assert opened.num_tokens[bucket] == sum(lengths[number] for number in wanted)
        assert opened.documents(bucket, np.arange(len(wanted))).tolist() == wanted


def test_powers_of_two_fall_on_the_right_side() -> None:
    lengths = [2**power + delta for power in range(2, 40) for delta in (-1, 0, 1)]
    rows = length_histogram([np.cumsum([0, *lengths])])
    assert all(row["documents"] == 3 for row in rows[2:-1])


def test_one_bucket_keeps_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The histogram alone tells that all documents are short, so the index is not even read."""
    split: Any = FakeSplit([[5, 9, 31] * 50], histogram=True)
    split.offsets = None
    opened = LengthBuckets(split, (32, 64))
    assert opened.num_documents == [150, 0, 0]
    assert opened.documents(0, np.array([3, 149])).tolist() == [3, 149]
    # A bound inside a power of two is only told by the lengths themselves.
    assert open_buckets([[5, 9, 31] * 50], (30, 64), True).num_documents == [100, 50, 0]


@pytest.mark.parametrize("bounds", [[], [5], [5, 5], [0, 9], [9, 5], [1, 2, 3]])
def test_wrong_bounds(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"data.length_bounds=\[.*the second above the first"):
        check_length_bounds(bounds)


def test_folder_without_a_histogram(make_folder: MakeFolder) -> None:
    """Folders of an earlier fulmen: lengths come from the index in any case."""
    path: Path = make_folder("old", [[1] * 3, [1] * 40, [1] * 90, [1] * 4], num_shards=2)
    split = PreparedSplit(path, "train", name="old", vocab_size=9)
    assert split.histogram is None
    opened = LengthBuckets(split, (32, 64))
    assert dict(zip(BUCKETS, opened.num_documents, strict=True)) == {
        "short": 2,
        "medium": 1,
        "long": 1,
    }
