"""Seeded random orders of 0 .. size - 1 that need no memory, whatever the size."""

import hashlib

import numpy as np

from fulmen.data.shards import IntArray

_ROUNDS = 8
_MULTIPLIER_A = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_B = np.uint64(0xD6E8FEB86659FD93)


class RandomOrder:
    """A pseudo-random permutation of 0 .. size - 1, given by a key.

    A Feistel network permutes the smallest power of four that holds `size`; a value that falls
    outside is permuted again until it falls inside, which keeps the map one-to-one. So any place
    of the order is computed by itself, and a cursor is all that a resume needs.
    """

    def __init__(self, size: int, key: str) -> None:
        assert 1 <= size < 2**62
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def at(self, start: int, stop: int) -> IntArray:
        """The values at places start .. stop - 1 of the order."""
        assert 0 <= start <= stop <= self.size
        values = self._permute(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._permute(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        half, down = self._half, np.uint64(64) - self._half
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in self._keys:
            mixed = (right ^ key) * _MULTIPLIER_A
            mixed ^= mixed >> np.uint64(32)
            mixed *= _MULTIPLIER_B
            left, right = right, left ^ (mixed >> down)
        return (left << half) | right
