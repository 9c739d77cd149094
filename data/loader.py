"""The loader: from prepared folders to the micro-batches of each training step."""

import hashlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np

from fulmen.data.buckets import BUCKETS, check_length_bounds
from fulmen.data.config import SourceConfig
from fulmen.data.image_shards import CHOSEN, IMAGE_TOKENS, IMAGES, LABELS, TILES
from fulmen.data.micro_batches import MicroBatchReader, check_fits
from fulmen.data.mixture import Mixture, Shares
from fulmen.data.packing import (
    DOCUMENT,
    LAST,
    LENGTH,
    SOURCE,
    START,
    PackedBatch,
    Piece,
    Rest,
    pack_rows,
)
from fulmen.data.shards import IntArray, PreparedSplit

_STATE_VERSION = 2
Account = dict[str, dict[str, int]]
"""Tokens by source and length bucket."""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What is known of an optimiser step as a whole, over all data-parallel ranks."""

    num_tokens: int
    """Real tokens, padding left out."""
    labels: dict[str, int]
    """Tokens with a label by source; every source is there, in the order of their numbers."""
    sum_squared_lengths: int
    """Sum over documents (pieces of a cut one apart) of length^2, for attention FLOPs."""
    num_images: int
    num_tiles: int
    """Tiles of all images, thumbnails included: passes through the vision tower."""
    num_image_tokens: int
    """Tokens that are an image's, of `num_tokens`."""
    num_pairs: int
    """Pairs of a preferred and another answer."""
    account: Account
    """Real tokens of this step by source and bucket; a document's whole length decides which."""
    digest: str
    """Hash of what the step holds: equal digest = equal micro-batches."""
    state: dict[str, Any]
    """JSON-able state after this step: give it to a new loader to go on from here."""

    @property
    def num_labels(self) -> int:
        """Tokens with a label."""
        return sum(self.labels.values())


@dataclass(frozen=True, kw_only=True)
class StepBatch(StepTotals):
    """What one optimiser step trains on."""

    micro_batches: list[PackedBatch]
    """Micro-batches of this rank, in order."""


@dataclass(frozen=True, kw_only=True)
class _StepPlan(StepTotals):
    """A step before its tokens are read."""

    pieces: list[IntArray]
    """`[n, 5]` for each micro-batch, all ranks."""


class PackedLoader:
    """An endless iterator of StepBatch whose order depends on the seed and the step alone.

    Every rank plans every step from the documents' lengths and reads only the tokens of its own
    micro-batches: j of a step belongs to rank j % dp_size. `batch_tokens` gives the step's global
    batch in tokens, padding included, and `shares` what its documents are drawn by, both from the
    real tokens of all earlier steps. `state` is a StepBatch.state, taken with any dp_size;
    seq_len, batch sizes and shares may differ from those it was taken with, the data, the length
    bounds and the seed may not. Images are decoded by `image_workers` processes (0 = in the
    background thread), and of each micro-batch's tiles those of `tile_part`, (part, parts), are
    given: the ranks that share a micro-batch share its tiles. Raises ValueError at once for
    whatever is wrong with the sources, the sizes or the first shares. A background thread keeps
    `prefetch_steps` ready; what it raises comes out of `__next__`.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        *,
        seq_len: int,
        micro_batch_tokens: int,
        batch_tokens: Callable[[int], int],
        shares: Callable[[int], Shares],
        seed: int,
        vocab_size: int,
        length_bounds: Sequence[int] = (32768, 131072),
        dp_rank: int = 0,
        dp_size: int = 1,
        split: str = "train",
        prefetch_steps: int = 2,
        image_workers: int = 0,
        tile_part: tuple[int, int] = (0, 1),
        state: dict[str, Any] | None = None,
    ) -> None:
        _check_micro_batch(seq_len, micro_batch_tokens)
        splits = _open_sources(sources, split, vocab_size, dp_rank, dp_size)
        for one in splits:
            check_fits(one, seq_len)
        self._reader = MicroBatchReader(
            splits, micro_batch_tokens, image_workers=image_workers, tile_part=tile_part
        )
        self._planner = _Planner(
            splits,
            seq_len=seq_len,
            micro_batch_tokens=micro_batch_tokens,
            batch_tokens=batch_tokens,
            shares=shares,
            length_bounds=check_length_bounds(length_bounds),
            seed=seed,
            dp_size=dp_size,
            state=state,
        )
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(max(1, prefetch_steps))
        self._thread: threading.Thread | None = None
        if prefetch_steps > 0:
            # The thread holds no reference to the loader, so a dropped loader ends it.
            weakref.finalize(self, self._stop.set)
            self._thread = threading.Thread(
                target=_produce,
                args=(self._planner, self._reader, dp_rank, dp_size, self._ready, self._stop),
                name="fulmen-loader",
                daemon=True,
            )
            self._thread.start()

    @property
    def splits(self) -> list[PreparedSplit]:
        """The open sources, sorted by name."""
        return self._planner.splits

    def check_shares(self, shares: Shares) -> None:
        """ValueError, naming the key, for shares that the sources cannot serve."""
        self._planner.mixture.check_shares(shares)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            return _read_step(self._planner, self._reader, self._dp_rank, self._dp_size)
        step = self._ready.get()
        if isinstance(step, BaseException):
            self._error = step
            raise step
        return step

    def close(self) -> None:
        """Stop the background thread; the loader gives no further steps."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._reader.close()


def _produce(
    planner: "_Planner",
    reader: MicroBatchReader,
    dp_rank: int,
    dp_size: int,
    ready: "queue.Queue[StepBatch | BaseException]",
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        item: StepBatch | BaseException
        try:
            item = _read_step(planner, reader, dp_rank, dp_size)
        except BaseException as error:  # re-raised in the training thread
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _read_step(
    planner: "_Planner", reader: MicroBatchReader, dp_rank: int, dp_size: int
) -> StepBatch:
    plan = planner.next_step()
    totals = {item.name: getattr(plan, item.name) for item in fields(StepTotals)}
    micro_batches = reader.read(plan.pieces[dp_rank::dp_size])
    return StepBatch(micro_batches=micro_batches, **totals)


class _Planner:
    """Works out each step's pieces from lengths alone, the same on every rank."""

    def __init__(
        self,
        splits: list[PreparedSplit],
        *,
        seq_len: int,
        micro_batch_tokens: int,
        batch_tokens: Callable[[int], int],
        shares: Callable[[int], Shares],
        length_bounds: Sequence[int],
        seed: int,
        dp_size: int,
        state: dict[str, Any] | None,
    ) -> None:
        if state is not None and state["version"] != _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's data state has version {state['version']}, this code reads "
                f"{_STATE_VERSION}: finish that run with the fulmen that began it, or start a new "
                "run from its weights"
            )
        if state is not None and state["seed"] != seed:
            raise ValueError(
                f"seed={seed}, but the checkpoint's data order has seed={state['seed']}: resume "
                "with that seed, or start a new run"
            )
        self.splits = splits
        self.micro_batch_tokens = micro_batch_tokens
        self._seq_len, self._seed, self._dp_size = seq_len, seed, dp_size
        self._batch_tokens, self._shares = batch_tokens, shares
        self.mixture = Mixture(
            splits, length_bounds, seed=seed, state=None if state is None else state["mixture"]
        )
        self._step: int = state["step"] if state else 0
        self._tokens: int = state["tokens"] if state else 0
        self._account: Account = {split.name: dict.fromkeys(BUCKETS, 0) for split in splits}
        if state is not None:
            self._account |= {name: dict(row) for name, row in state["account"].items()}
        names = [(split.name, bucket) for split in splits for bucket in BUCKETS]
        self._streams = {name: number for number, name in enumerate(names)}
        self._pending: list[Rest] = [
            (self._streams[name, bucket], document, start, length)
            for name, bucket, document, start, length in (state["pending"] if state else [])
        ]
        held = [f"{split.name}={split.fingerprint}" for split in splits]
        self._digest_head = f"{seq_len} {micro_batch_tokens} {' '.join(held)}".encode()
        self._num_micro_batches()  # what is wrong is an error now, not in a thread later
        self.mixture.set_shares(shares(self._tokens))

    def next_step(self) -> _StepPlan:
        count = self._num_micro_batches()
        rows_each = self.micro_batch_tokens // self._seq_len
        self.mixture.set_shares(self._shares(self._tokens))
        rows, self._pending = pack_rows(
            self.mixture.draw, self._pending, num_rows=count * rows_each, seq_len=self._seq_len
        )
        micro_batches = [
            _as_array(rows[first : first + rows_each]) for first in range(0, len(rows), rows_each)
        ]
        pieces = np.concatenate(micro_batches)
        lengths = pieces[:, LENGTH]
        account = self._take_streams(micro_batches, pieces)
        num_tokens = int(lengths.sum())
        hasher = hashlib.blake2b(self._digest_head, digest_size=8)
        for micro_batch in micro_batches:
            hasher.update(len(micro_batch).to_bytes(8, "little"))
            hasher.update(micro_batch.tobytes())
        self._step += 1
        self._tokens += num_tokens
        return _StepPlan(
            pieces=micro_batches,
            num_tokens=num_tokens,
            account=account,
            **_add_up(np.concatenate(micro_batches), self.splits),
            digest=hasher.hexdigest(),
            state=self._state(),
        )

    def _take_streams(self, micro_batches: Sequence[IntArray], pieces: IntArray) -> Account:
        """Account for the step's pieces, and turn their streams into sources."""
        tokens = np.zeros(len(self._streams), np.int64)
        np.add.at(tokens, pieces[:, SOURCE], pieces[:, LENGTH])
        for micro_batch in micro_batches:
            micro_batch[:, SOURCE] //= len(BUCKETS)
        account: Account = {split.name: {} for split in self.splits}
        for (name, bucket), taken in zip(self._streams, tokens.tolist(), strict=True):
            account[name][bucket] = taken
            self._account[name][bucket] += taken
        return account

    def _num_micro_batches(self) -> int:
        tokens = self._batch_tokens(self._tokens)
        whole = self.micro_batch_tokens * self._dp_size
        if tokens <= 0 or tokens % whole:
            raise ValueError(
                f"data.global_batch_tokens: the batch of {tokens} tokens (after {self._tokens} "
                f"tokens) is not a multiple of trainer.micro_batch_tokens="
                f"{self.micro_batch_tokens} x {self._dp_size} data-parallel ranks = {whole} "
                f"(data.seq_len={self._seq_len})"
            )
        return tokens // self.micro_batch_tokens

    def _state(self) -> dict[str, Any]:
        names = list(self._streams)
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "tokens": self._tokens,
            "seed": self._seed,
            "account": {name: dict(row) for name, row in self._account.items()},
            "mixture": self.mixture.state(),
            "pending": [
                [*names[stream], document, start, length]
                for stream, document, start, length in self._pending
            ],
        }


def evaluation_batches(
    split: PreparedSplit,
    *,
    seq_len: int,
    micro_batch_tokens: int,
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    tile_part: tuple[int, int] = (0, 1),
) -> Iterator[PackedBatch]:
    """This rank's micro-batches of a held-out split: each document once, in a fixed order.

    Stops after `max_tokens` real tokens over all ranks; the last document is cut there, or left out
    where it may have images (the first one comes whole). Every
    rank gets the same number of batches: where there are too few, some hold padding alone, with
    no label. What the batches hold does not depend on dp_size. Errors are raised at the call, not
    at the first batch.
    """
    _check_micro_batch(seq_len, micro_batch_tokens)
    check_fits(split, seq_len)
    assert max_tokens > 0
    plan = _plan_evaluation(
        split, max_tokens=max_tokens, seq_len=seq_len, micro_batch_tokens=micro_batch_tokens
    )
    plan += [_as_array([])] * (-len(plan) % dp_size)
    reader = MicroBatchReader([split], micro_batch_tokens, tile_part=tile_part)
    return (reader.read([pieces])[0] for pieces in plan[dp_rank::dp_size])


def _plan_evaluation(
    split: PreparedSplit, *, max_tokens: int, seq_len: int, micro_batch_tokens: int
) -> list[IntArray]:
    # A document has at least one token, so these are enough.
    documents = np.arange(min(split.num_documents, max_tokens))
    lengths = np.array(split.lengths(documents))
    # A document cut by max_tokens ends in a piece that has a label for its last token.
    cut = np.minimum(lengths, max_tokens - (np.cumsum(lengths) - lengths))
    if split.images is not None:
        cut = np.where(cut == lengths, lengths, 0)
        cut[0] = lengths[0]
    upcoming = iter([(0, int(number), int(cut[number])) for number in documents if cut[number] > 0])
    num_rows = micro_batch_tokens // seq_len
    plan: list[IntArray] = []
    pending: list[Rest] = []
    while True:
        rows, pending = pack_rows(
            lambda: next(upcoming, None), pending, num_rows=num_rows, seq_len=seq_len
        )
        pieces = _as_array(rows)
        if not len(pieces):
            return plan
        pieces[:, LAST] = pieces[:, START] + pieces[:, LENGTH] == lengths[pieces[:, DOCUMENT]]
        plan.append(pieces)


def _add_up(pieces: IntArray, splits: Sequence[PreparedSplit]) -> dict[str, Any]:
    """Totals of a step that follow from its pieces and the indexes."""
    lengths = pieces[:, LENGTH]
    labels = np.bincount(
        pieces[:, SOURCE], weights=lengths - pieces[:, LAST], minlength=len(splits)
    ).astype(np.int64)
    totals = {
        "sum_squared_lengths": int((lengths * lengths).sum()),
        **dict.fromkeys(("num_images", "num_tiles", "num_image_tokens", "num_pairs"), 0),
    }
    for source, split in enumerate(splits):
        mine = pieces[pieces[:, SOURCE] == source]
        if split.images is None or not len(mine):
            continue
        whole, held = mine[:, LENGTH], split.images.totals(*split.places(mine[:, DOCUMENT]))
        chosen = held[:, CHOSEN]
        labels[source] += int(held[:, LABELS].sum() - (whole - 1).sum())
        # Of a pair, chosen^2 + (whole - chosen)^2 instead of whole^2.
        totals["sum_squared_lengths"] -= int((2 * chosen * (whole - chosen)).sum())
        totals["num_images"] += int(held[:, IMAGES].sum())
        totals["num_tiles"] += int(held[:, TILES].sum())
        totals["num_image_tokens"] += int(held[:, IMAGE_TOKENS].sum())
        totals["num_pairs"] += int((chosen > 0).sum())
    names = (split.name for split in splits)
    return totals | {"labels": dict(zip(names, labels.tolist(), strict=True))}


def _as_array(rows: Sequence[Sequence[Piece]]) -> IntArray:
    return np.array(list(chain.from_iterable(rows)), dtype=np.int64).reshape(-1, 5)


def _open_sources(
    sources: Mapping[str, SourceConfig], split: str, vocab_size: int, part: int, num_parts: int
) -> list[PreparedSplit]:
    """Every source, sorted by name so that the order in the configuration changes nothing."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one prepared folder")
    splits = [
        PreparedSplit(
            source.path, split, name=name, vocab_size=vocab_size, part=part, num_parts=num_parts
        )
        for name, source in sorted(sources.items())
    ]
    for other in splits[1:]:
        if other.tokenizer_sha256 != splits[0].tokenizer_sha256:
            raise ValueError(
                f"data.sources.{splits[0].name} and data.sources.{other.name} were prepared with "
                "different tokenizers: prepare both with one tokenizer"
            )
    return splits


def _check_micro_batch(seq_len: int, micro_batch_tokens: int) -> None:
    if seq_len <= 0:
        raise ValueError(f"data.seq_len={seq_len} must be above 0")
    if micro_batch_tokens <= 0 or micro_batch_tokens % seq_len:
        raise ValueError(
            f"trainer.micro_batch_tokens={micro_batch_tokens} must be a multiple of "
            f"data.seq_len={seq_len}"
        )
