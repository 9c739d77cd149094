"""Documents by length: the histogram of a prepared split, and its buckets at given bounds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fulmen.data.shards import IntArray, PreparedSplit

BUCKETS = ("short", "medium", "long")
"""Names of the buckets; the bounds lie between them, each the least length of the next bucket."""
# Documents whose lengths are looked at at once.
_BLOCK = 2**20


def check_length_bounds(bounds: Sequence[int]) -> tuple[int, ...]:
    """The bounds, or ValueError where they do not part three buckets."""
    given = tuple(bounds)
    if len(given) != len(BUCKETS) - 1 or not 0 < given[0] < given[1]:
        raise ValueError(
            f"data.length_bounds={list(given)}: give two lengths in tokens, the least of a medium "
            "and the least of a long document, the second above the first"
        )
    return given


def bucket_of(lengths: Any, bounds: Sequence[int]) -> Any:
    """Number of the bucket of each length."""
    return np.searchsorted(np.asarray(bounds), lengths, side="right")


def length_histogram(offsets: Sequence[npt.NDArray[Any]]) -> list[dict[str, int]]:
    """Documents and tokens by length, in powers of two, from the index of each shard.

    Independent of any bounds: a row for each `from` = 2^k that has documents of `from` to
    2 * `from` - 1 tokens.
    """
    documents, tokens = np.zeros(63, np.int64), np.zeros(63, np.int64)
    for _, lengths in _blocks(offsets):
        # frexp, because a logarithm of 2^k - 1 can round up.
        powers = np.frexp(lengths.astype(np.float64))[1] - 1
        documents += np.bincount(powers, minlength=63)
        # Whole numbers below 2^53 are exact as the floats that bincount sums.
        tokens += np.bincount(powers, weights=lengths, minlength=63).astype(np.int64)
    return [
        {"from": 2**power, "documents": int(documents[power]), "tokens": int(tokens[power])}
        for power in np.flatnonzero(documents).tolist()
    ]


class LengthBuckets:
    """The documents of a split by bucket, each bucket's in the order of their numbers.

    Numbers are kept for all but the largest bucket: what it holds are the documents in none of
    the others. So ten million long documents among a billion cost 40 MB, and a split of one
    bucket nothing.
    """

    def __init__(self, split: PreparedSplit, bounds: Sequence[int]) -> None:
        self._size = split.num_documents
        self.num_documents = [0] * len(BUCKETS)
        """Documents of each bucket."""
        self.num_tokens = [0] * len(BUCKETS)
        """Tokens of each bucket."""
        only = _only_bucket(split.histogram, bounds)
        if only is not None:
            self.num_documents[only] = split.num_documents
            self.num_tokens[only] = split.num_tokens
        else:
            self._count(split, bounds)
        self._largest = int(np.argmax(self.num_documents))
        self._numbers: list[npt.NDArray[Any]] = [np.zeros(0, np.int32) for _ in BUCKETS]
        if max(self.num_documents) < self._size:
            self._collect(split, bounds)
        others = [one for number, one in enumerate(self._numbers) if number != self._largest]
        elsewhere = np.sort(np.concatenate(others))
        # Documents of the largest bucket that lie before each one that is elsewhere.
        self._before = elsewhere - np.arange(len(elsewhere), dtype=elsewhere.dtype)

    def documents(self, bucket: int, places: IntArray) -> IntArray:
        """Numbers of the documents at some places of a bucket."""
        if bucket != self._largest:
            return self._numbers[bucket][places].astype(np.int64)
        return places + np.searchsorted(self._before, places, side="right")

    def _count(self, split: PreparedSplit, bounds: Sequence[int]) -> None:
        for _, lengths in _blocks(split.offsets):
            buckets = bucket_of(lengths, bounds)
            documents = np.bincount(buckets, minlength=len(BUCKETS))
            tokens = np.bincount(buckets, weights=lengths, minlength=len(BUCKETS))
            for number in range(len(BUCKETS)):
                self.num_documents[number] += int(documents[number])
                self.num_tokens[number] += int(tokens[number])

    def _collect(self, split: PreparedSplit, bounds: Sequence[int]) -> None:
        dtype = np.int32 if self._size < 2**31 else np.int64
        found: list[list[npt.NDArray[Any]]] = [[np.zeros(0, dtype)] for _ in BUCKETS]
        for first, lengths in _blocks(split.offsets):
            buckets = bucket_of(lengths, bounds)
            for number in range(len(BUCKETS)):
                if number != self._largest and self.num_documents[number]:
                    mine = np.flatnonzero(buckets == number) + first
                    found[number].append(mine.astype(dtype))
        self._numbers = [np.concatenate(parts) for parts in found]


def _blocks(offsets: Sequence[npt.NDArray[Any]]) -> Iterator[tuple[int, IntArray]]:
    """(number of the first document, lengths) of some documents at a time, over all shards."""
    first = 0
    for shard in offsets:
        for begin in range(0, len(shard) - 1, _BLOCK):
            lengths = np.diff(shard[begin : begin + _BLOCK + 1])
            yield first, lengths
            first += len(lengths)


def _only_bucket(histogram: list[dict[str, int]] | None, bounds: Sequence[int]) -> int | None:
    """The bucket that holds every document, where the histogram alone can tell."""
    if histogram is None:
        return None
    ends = [[row["from"], 2 * row["from"] - 1] for row in histogram]
    buckets = set(bucket_of(np.array(ends), bounds).ravel().tolist())
    return buckets.pop() if len(buckets) == 1 else None
