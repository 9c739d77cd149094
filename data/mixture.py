"""Weighted mixture of sources and document lengths: which document comes next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.data.buckets import BUCKETS, LengthBuckets
from fulmen.data.permutation import RandomOrder
from fulmen.data.shards import PreparedSplit

# Documents whose order and lengths are worked out at once.
_BLOCK = 1024


@dataclass(frozen=True)
class Shares:
    """What the tokens drawn from now on are to consist of; all values are relative."""

    sources: dict[str, float]
    """Weight of each source; 0 turns one off."""
    lengths: dict[str, float] | None
    """Share of tokens by length bucket; None = each source gives its documents as they are."""


class _Cursor:
    """A place in the endless epochs of a source's documents of one bucket.

    Each epoch has a random order of its own.
    """

    def __init__(
        self, split: PreparedSplit, buckets: LengthBuckets, bucket: int, *, key: str
    ) -> None:
        self.epoch = self.position = 0
        self._split, self._buckets, self._bucket, self._key = split, buckets, bucket, key
        self._documents: list[int] = []
        self._lengths: list[int] = []
        self._block_start = 0

    def next(self) -> tuple[int, int]:
        """Number and length of the next document."""
        place = self.position - self._block_start
        if place >= len(self._documents):
            self._fill()
            place = 0
        self.position += 1
        return self._documents[place], self._lengths[place]

    def go_to(self, epoch: int, position: int) -> None:
        """Go on from a place of an earlier run."""
        self.epoch, self.position = epoch, position
        self._documents, self._block_start = [], position

    def _fill(self) -> None:
        size = self._buckets.num_documents[self._bucket]
        if self.position >= size:
            self.epoch, self.position = self.epoch + 1, 0
        stop = min(self.position + _BLOCK, size)
        places = RandomOrder(size, f"{self._key}/{self.epoch}").at(self.position, stop)
        documents = self._buckets.documents(self._bucket, places)
        self._documents, self._lengths = documents.tolist(), self._split.lengths(documents)
        self._block_start = self.position


class _Credit:
    """What each of some streams is owed: its share of all tokens drawn, less its own."""

    def __init__(self, size: int) -> None:
        self.owed = [0.0] * size
        self._shares: list[tuple[int, float]] = []

    def set_shares(self, shares: Sequence[float]) -> None:
        """Relative shares from now on; one without a share is not chosen, whatever it is owed."""
        total = sum(shares)
        self._shares = [(number, one / total) for number, one in enumerate(shares) if one > 0]

    def choose(self) -> int:
        """The stream that is owed most."""
        owed, chosen = self.owed, self._shares[0][0]
        for number, _ in self._shares:
            if owed[number] > owed[chosen]:
                chosen = number
        return chosen

    def charge(self, chosen: int, tokens: int) -> None:
        """Account for tokens drawn from a stream."""
        if len(self._shares) == 1:
            return  # it is owed what it gets
        for number, share in self._shares:
            self.owed[number] += tokens * share
        self.owed[chosen] -= tokens


class Mixture:
    """An endless series of documents whose tokens follow the shares, which may change at any time.

    A document is chosen by bucket first and then by source. Each drawn document of n tokens adds
    n times its share to the credit of every bucket and takes n from its own, and so for the
    sources within the bucket; the next comes from where the credit is largest. So what is drawn
    follows the integral of the shares, to about a document, and a change of shares neither makes
    up for what was drawn before nor forgets what is owed. Within a source and bucket each
    document comes once an epoch. `state` is a former `state()`.
    """

    def __init__(
        self,
        splits: Sequence[PreparedSplit],
        length_bounds: Sequence[int],
        *,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._splits, self._bounds = list(splits), list(length_bounds)
        self._buckets = [LengthBuckets(split, length_bounds) for split in splits]
        self._cursors = [
            [
                _Cursor(split, buckets, number, key=f"{seed}/{split.name}/{split.split}/{name}")
                for number, name in enumerate(BUCKETS)
            ]
            for split, buckets in zip(self._splits, self._buckets, strict=True)
        ]
        self._credit = _Credit(len(BUCKETS))
        self._source_credit = [_Credit(len(splits)) for _ in BUCKETS]
        self._shares: Shares | None = None
        if state is not None:
            self._load(state)

    def set_shares(self, shares: Shares) -> None:
        """Draw by these from now on; ValueError for shares that cannot be."""
        if shares == self._shares:
            return
        joint = self._joint_shares(shares)
        self._credit.set_shares([sum(row) for row in joint])
        for credit, row in zip(self._source_credit, joint, strict=True):
            if any(row):
                credit.set_shares(row)
        self._shares = shares

    def check_shares(self, shares: Shares) -> None:
        """ValueError for shares that cannot be drawn; changes nothing."""
        self._joint_shares(shares)

    def draw(self) -> tuple[int, int, int]:
        """Stream, document number and length in tokens of the next document.

        The stream is source number * len(BUCKETS) + bucket number.
        """
        bucket = self._credit.choose()
        source = self._source_credit[bucket].choose()
        document, length = self._cursors[source][bucket].next()
        self._credit.charge(bucket, length)
        self._source_credit[bucket].charge(source, length)
        return source * len(BUCKETS) + bucket, document, length

    def state(self) -> dict[str, Any]:
        """JSON-able place of every stream; independent of ranks and of batch shapes."""
        return {
            "length_bounds": self._bounds,
            "credit": dict(zip(BUCKETS, self._credit.owed, strict=True)),
            "sources": {
                split.name: {
                    "fingerprint": split.fingerprint,
                    "buckets": {
                        name: {
                            "epoch": cursor.epoch,
                            "position": cursor.position,
                            "credit": self._source_credit[bucket].owed[number],
                        }
                        for bucket, (name, cursor) in enumerate(zip(BUCKETS, cursors, strict=True))
                    },
                }
                for number, (split, cursors) in enumerate(
                    zip(self._splits, self._cursors, strict=True)
                )
            },
        }

    def _load(self, state: dict[str, Any]) -> None:
        if state["length_bounds"] != self._bounds:
            raise ValueError(
                f"data.length_bounds={self._bounds}, but the checkpoint's are "
                f"{state['length_bounds']}: resume with those, or start a new run"
            )
        _check_same_data(self._splits, state["sources"])
        self._credit.owed = [state["credit"][name] for name in BUCKETS]
        for source, split in enumerate(self._splits):
            if split.name not in state["sources"]:
                continue  # it begins now, and is owed nothing
            for bucket, name in enumerate(BUCKETS):
                place = state["sources"][split.name]["buckets"][name]
                self._cursors[source][bucket].go_to(place["epoch"], place["position"])
                self._source_credit[bucket].owed[source] = place["credit"]

    def _joint_shares(self, shares: Shares) -> list[list[float]]:
        """Share of all tokens by bucket and source: the rows sum to 1."""
        weights = _check_weights(shares.sources, self._splits)
        if shares.lengths is None:
            total = sum(weights)
            return [
                [
                    weight / total * buckets.num_tokens[number] / split.num_tokens
                    for weight, buckets, split in zip(
                        weights, self._buckets, self._splits, strict=True
                    )
                ]
                for number in range(len(BUCKETS))
            ]
        lengths = _check_lengths(shares.lengths)
        joint = []
        for number, name in enumerate(BUCKETS):
            able = [
                weight if buckets.num_documents[number] else 0.0
                for weight, buckets in zip(weights, self._buckets, strict=True)
            ]
            if lengths[number] > 0 and not sum(able):
                raise ValueError(self._nothing_to_draw(name, lengths[number]))
            share = lengths[number] / sum(lengths) / (sum(able) or 1.0)
            joint.append([share * weight for weight in able])
        return joint

    def _nothing_to_draw(self, name: str, share: float) -> str:
        medium, long = self._bounds
        held = [f"fewer than {medium}", f"{medium} to {long - 1}", f"{long} or more"]
        return (
            f"lengths.{name}={share}: no source with a weight above 0 has documents of "
            f"{held[BUCKETS.index(name)]} tokens: give such a source in data.sources, set the "
            f"share to 0, or change data.length_bounds={self._bounds}"
        )


def _check_weights(weights: Mapping[str, float], splits: Sequence[PreparedSplit]) -> list[float]:
    for name, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"data.sources.{name}.weight={weight} must be a number of 0 or more")
    names = {split.name for split in splits}
    for name in sorted(names ^ weights.keys()):
        problem = "has no weight" if name in names else "has a weight but is no source"
        raise ValueError(f"data.sources.{name} {problem}: give every source one weight")
    if not any(weights.values()):
        raise ValueError("data.sources: at least one source needs a weight above 0")
    return [float(weights[split.name]) for split in splits]


def _check_lengths(lengths: Mapping[str, float]) -> list[float]:
    for name, share in lengths.items():
        if name not in BUCKETS:
            raise ValueError(f"lengths.{name}: the buckets are {', '.join(BUCKETS)}")
        if not (share >= 0 and math.isfinite(share)):
            raise ValueError(f"lengths.{name}={share} must be a number of 0 or more")
    if not any(lengths.values()):
        raise ValueError("lengths: at least one bucket needs a share above 0")
    return [float(lengths.get(name, 0.0)) for name in BUCKETS]


def _check_same_data(splits: Sequence[PreparedSplit], places: Mapping[str, Any]) -> None:
    """A resumed run must see the documents it began with: the cursors count those."""
    names = {split.name for split in splits}
    for name in sorted(places.keys() - names):
        raise ValueError(
            f"data.sources.{name} is gone since the checkpoint: resume with the same sources and "
            "more, if you like (weight=0 turns one off), or start a new run"
        )
    for split in splits:
        place = places.get(split.name)
        if place is not None and place["fingerprint"] != split.fingerprint:
            raise ValueError(
                f"data.sources.{split.name}: {split.path} holds other data than at the checkpoint "
                "(another fingerprint): resume with the same data, give the other data as a source "
                "of another name, or start a new run"
            )
