"""Pack whole documents into rows, and rows into the micro-batches which the model sees.

A document longer than a row is cut into row-sized pieces, and each piece is a document of its
own for the model: neither state nor attention crosses the cut. The last token of a cut piece is
still given its label, the next token of the document, so each token but the first of a document
is predicted exactly once.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    pieces: IntArray, splits: Sequence[PreparedSplit], *, num_tokens: int
) -> PackedBatch:
    """Read the tokens of `pieces` ([n, 5], see Piece) into a buffer of `num_tokens`."""
    ids = np.zeros(num_tokens, dtype=np.int64)
    labels = np.full(num_tokens, IGNORE_LABEL, dtype=np.int64)
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
            if not last:
                after_cut.append((end - 1, int(tokens[first + end - begin])))
    if real:
        labels[: real - 1] = ids[1:real]
        labels[ends - 1] = IGNORE_LABEL
    for place, token in after_cut:
        labels[place] = token
    _check_vocabulary(ids, pieces, splits)
    bounds = [0, *ends.tolist()] + ([num_tokens] if real < num_tokens else [])
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        num_tokens=real,
    )


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
