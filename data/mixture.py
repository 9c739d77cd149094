"""Weighted mixture of sources: which document comes next."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fulmen.data.permutation import RandomOrder
from fulmen.data.shards import PreparedSplit

# Documents whose order and lengths are worked out at once.
_BLOCK = 1024


class _Cursor:
    """A source's place in its endless series of epochs, each in a random order of its own."""

    def __init__(self, split: PreparedSplit, *, seed: int, epoch: int, position: int) -> None:
        self.split, self.seed = split, seed
        self.epoch, self.position = epoch, position
        self._documents: list[int] = []
        self._lengths: list[int] = []
        self._block_start = position

    def next(self) -> tuple[int, int]:
        """Number and length of the next document."""
        place = self.position - self._block_start
        if place >= len(self._documents):
            self._fill()
            place = 0
        self.position += 1
        return self._documents[place], self._lengths[place]

    def _fill(self) -> None:
        size = self.split.num_documents
        if self.position >= size:
            self.epoch, self.position = self.epoch + 1, 0
        key = f"{self.seed}/{self.split.name}/{self.split.split}/{self.epoch}"
        stop = min(self.position + _BLOCK, size)
        documents = RandomOrder(size, key).at(self.position, stop)
        self._documents, self._lengths = documents.tolist(), self.split.lengths(documents)
        self._block_start = self.position


class Mixture:
    """An endless series of documents whose token shares follow the weights.

    The next document comes from the source with the least tokens drawn for its weight; within a
    source each document comes once an epoch. `state` is a former `state()`: cursors go on where
    they were, and the token counts too unless the weights changed, so that changed weights count
    from the resume on instead of making up for what was drawn before.
    """

    def __init__(
        self,
        splits: Sequence[PreparedSplit],
        weights: Mapping[str, float],
        *,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        for name, weight in weights.items():
            if not (weight >= 0 and np.isfinite(weight)):
                raise ValueError(
                    f"data.sources.{name}.weight={weight} must be a number of 0 or more"
                )
        if not any(weights[split.name] > 0 for split in splits):
            raise ValueError("data.sources: at least one source needs a weight above 0")
        self._splits = list(splits)
        self._weights = {split.name: float(weights[split.name]) for split in splits}
        places = (state or {}).get("sources", {})
        if state is not None:
            _check_same_data(self._splits, places)
        keep_counts = state is not None and state["weights"] == self._weights
        self._cursors = []
        self._drawn = []
        for split in splits:
            place = places.get(split.name, {"epoch": 0, "position": 0})
            self._cursors.append(
                _Cursor(split, seed=seed, epoch=place["epoch"], position=place["position"])
            )
            self._drawn.append(place["drawn_tokens"] if keep_counts else 0)
        self._queue = [
            (self._drawn[number] / self._weights[split.name], number)
            for number, split in enumerate(splits)
            if self._weights[split.name] > 0
        ]
        heapq.heapify(self._queue)

    def draw(self) -> tuple[int, int, int]:
        """Source number, document number and length in tokens of the next document."""
        number = self._queue[0][1]
        document, length = self._cursors[number].next()
        self._drawn[number] += length
        share = self._drawn[number] / self._weights[self._splits[number].name]
        heapq.heapreplace(self._queue, (share, number))
        return number, document, length

    def state(self) -> dict[str, Any]:
        """JSON-able place of every source; independent of ranks and of batch shapes."""
        return {
            "weights": dict(self._weights),
            "sources": {
                split.name: {
                    "fingerprint": split.fingerprint,
                    "epoch": cursor.epoch,
                    "position": cursor.position,
                    "drawn_tokens": drawn,
                }
                for split, cursor, drawn in zip(
                    self._splits, self._cursors, self._drawn, strict=True
                )
            },
        }


def _check_same_data(splits: Sequence[PreparedSplit], places: Mapping[str, Any]) -> None:
    """A resumed run must see the documents it began with: the cursors count those."""
    names = {split.name for split in splits}
    for name in sorted(names ^ places.keys()):
        change = "is new" if name in names else "is gone"
        raise ValueError(
            f"data.sources.{name} {change} since the checkpoint: resume with the same sources "
            "(weight=0 turns one off), or start a new run"
        )
    for split in splits:
        if places[split.name]["fingerprint"] != split.fingerprint:
            raise ValueError(
                f"data.sources.{split.name}: {split.path} holds other data than at the checkpoint "
                "(another fingerprint): resume with the same data, or start a new run"
            )
