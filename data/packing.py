"""Pack whole documents into rows, and rows into the micro-batches which the model sees.

A document longer than a row is cut into row-sized pieces, and each piece is a document of its
own for the model: neither state nor attention crosses the cut. The last token of a cut piece is
still given its label, the next token of the document, so each token but the first of a document
is predicted exactly once. Documents of a source with images are never cut (see image_shards.py);
a pair of answers is one document to the packing, and two to the model.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fulmen.data.image_batches import PackedImages, Pair, undecoded
from fulmen.data.image_shards import CHOSEN, StoredImage
from fulmen.data.shards import IntArray, PreparedSplit

IGNORE_LABEL = -100
# Documents that found no row and wait for the next step; more of them fill the rows better.
PENDING_LIMIT = 64

# (source number, document number, first token, tokens): the rest of a document, yet unpacked.
Rest = tuple[int, int, int, int]
# (source number, document number, first token, tokens, 1 at the document's end else 0).
Piece = tuple[int, int, int, int, int]
# Columns of an array of pieces.
SOURCE, DOCUMENT, START, LENGTH, LAST = range(5)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens on the CPU: documents back to back, padding at the very end."""

    input_ids: Tensor
    """[1, T] int64; 0 in the padding."""
    labels: Tensor
    """[1, T] int64; -100 at the last token of a document and in the padding."""
    cu_seqlens: Tensor
    """[documents + 1] int32, from 0 to T; the padding, if any, is the last document."""
    num_tokens: int
    """Real tokens: T less the padding."""
    sources: Tensor | None = None
    """[1, T] int16: number of each token's source, in the order of the loader's; 0 in the padding.
    The loader always has them."""
    pairs: tuple[Pair, ...] = ()
    """Documents that are two answers to one prompt."""
    images: PackedImages | None = None
    """None where no source has images."""


def pack_rows(
    draw: Callable[[], tuple[int, int, int] | None],
    pending: Sequence[Rest],
    *,
    num_rows: int,
    seq_len: int,
) -> tuple[list[list[Piece]], list[Rest]]:
    """Fill `num_rows` rows with pieces and return them with what waits for the next rows.

    Each document goes to the fullest row that still holds it. `pending` comes first, in its
    order, so nothing waits for ever; then `draw` gives (source, document, length), or None when
    there is no more, until the rows are full or PENDING_LIMIT documents wait. The source's number
    is only handed on.
    """
    rows: list[list[Piece]] = [[] for _ in range(num_rows)]
    # room * num_rows + row, ascending: a search finds the smallest sufficient room.
    rooms = [seq_len * num_rows + row for row in range(num_rows)]

    def place(rest: Rest) -> Rest | None:
        source, document, start, length = rest
        while length:
            piece = min(length, seq_len)
            at = bisect_left(rooms, piece * num_rows)
            if at == len(rooms):
                return source, document, start, length
            room, row = divmod(rooms.pop(at), num_rows)
            if room > piece:
                insort(rooms, (room - piece) * num_rows + row)
            length -= piece
            rows[row].append((source, document, start, piece, 0 if length else 1))
            start += piece
        return None

    waiting = [rest for rest in map(place, pending) if rest]
    # With long documents, 64 would be many steps' tokens, drawn by shares of long ago.
    held = sum(length for *_, length in waiting)
    while rooms and len(waiting) < PENDING_LIMIT and held < num_rows * seq_len:
        drawn = draw()
        if drawn is None:
            break
        source, document, length = drawn
        rest = place((source, document, 0, length))
        if rest:
            waiting.append(rest)
            held += rest[-1]
    return rows, waiting


def read_micro_batch(
    pieces: IntArray,
    splits: Sequence[PreparedSplit],
    *,
    num_tokens: int,
) -> PackedBatch:
    """Read the tokens of `pieces` ([n, 5], see Piece) into a buffer of `num_tokens`.

    Its images, if a source has any, come without their tiles.
    """
    ids = np.zeros(num_tokens, dtype=np.int64)
    labels = np.full(num_tokens, IGNORE_LABEL, dtype=np.int64)
    sources = np.zeros(num_tokens, dtype=np.int16)
    ends = np.cumsum(pieces[:, LENGTH])
    begins = ends - pieces[:, LENGTH]
    real = int(ends[-1]) if len(ends) else 0
    assert real <= num_tokens
    after_cut: list[tuple[int, int]] = []
    for source, split in enumerate(splits):
        mine = np.flatnonzero(pieces[:, SOURCE] == source)
        if not mine.size:
            continue
        held = pieces[mine]
        shards, offsets = split.locate(held[:, DOCUMENT])
        for shard, offset, begin, end, start, last in zip(
            shards,
            offsets,
            begins[mine].tolist(),
            ends[mine].tolist(),
            held[:, START].tolist(),
            held[:, LAST].tolist(),
            strict=True,
        ):
            tokens, first = split.tokens[shard], offset + start
            ids[begin:end] = tokens[first : first + end - begin]
            sources[begin:end] = source
            if not last:
                after_cut.append((end - 1, int(tokens[first + end - begin])))
    if real:
        labels[: real - 1] = ids[1:real]
        labels[ends - 1] = IGNORE_LABEL
    for place, token in after_cut:
        labels[place] = token
    _check_vocabulary(ids, pieces, splits)
    extras = _read_extras(pieces, begins, splits, labels)
    bounds = [0, *sorted([*ends.tolist(), *extras.inner])]
    bounds += [num_tokens] if real < num_tokens else []
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        num_tokens=real,
        sources=torch.from_numpy(sources)[None],
        pairs=tuple(
            Pair(bounds.index(begin), splits[source].name, number)
            for begin, source, number in extras.pairs
        ),
        images=None if extras.images is None else undecoded(extras.images),
    )


@dataclass(frozen=True)
class _Extras:
    """What documents with images or masks bring into a micro-batch beside their tokens."""

    images: list[StoredImage] | None
    """None where no source has images."""
    pairs: list[tuple[int, int, int]]
    """First token, source number and document number of each pair."""
    inner: list[int]
    """First token of the second document of each pair."""


def _read_extras(
    pieces: IntArray, begins: IntArray, splits: Sequence[PreparedSplit], labels: IntArray
) -> _Extras:
    """Images and pairs in order; takes the labels that the documents' masks do not have."""
    if all(split.images is None for split in splits):
        return _Extras(None, [], [])
    images: list[StoredImage] = []
    extras = _Extras(images, [], [])
    # All pieces in order, for so lie the images.
    for (source, document, start, length, _), begin in zip(
        pieces.tolist(), begins.tolist(), strict=True
    ):
        split = splits[source]
        index = split.images
        if index is None:
            continue
        assert start == 0, "documents with images are never cut"
        number = np.array([document])
        (shard,), (offset,) = split.locate(number)
        mask = index.masks[shard][offset : offset + length]
        # The label of a token is the token after it, and so is its mask.
        labels[begin : begin + length - 1][mask[1:] == 0] = IGNORE_LABEL
        shards, places = split.places(number)
        for image in index.images(shard, int(places[0])):
            images.append(replace(image, first=begin + image.first))
        chosen = int(index.totals(shards, places)[0, CHOSEN])
        if chosen:
            extras.pairs.append((begin, source, document))
            extras.inner.append(begin + chosen)
    return extras


def _check_vocabulary(ids: IntArray, pieces: IntArray, splits: Sequence[PreparedSplit]) -> None:
    """Shards too large to be checked at start can still be damaged; an index outside the
    embedding would abort a GPU run with no word about the data."""
    vocab_size = min(split.vocab_size for split in splits)
    if ids.max() >= vocab_size:
        used = sorted({str(splits[source].path) for source in pieces[:, SOURCE].tolist()})
        raise ValueError(
            f"token id {ids.max()} is outside model.vocab_size={vocab_size}: a shard of "
            f"{', '.join(used)} is corrupt; prepare or copy it anew"
        )
