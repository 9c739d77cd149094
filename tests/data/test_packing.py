"""Packing: every token once, labels right, rows never too full, for documents of any length."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import write_folder

from fulmen.data.packing import (
    IGNORE_LABEL,
    LENGTH,
    PENDING_LIMIT,
    PackedBatch,
    Piece,
    Rest,
    pack_rows,
    read_micro_batch,
)
from fulmen.data.permutation import RandomOrder
from fulmen.data.shards import PreparedSplit

pytestmark = pytest.mark.fast
quick = settings(max_examples=60, deadline=None, database=None)


def pack_all(lengths: list[int], num_rows: int, seq_len: int) -> list[list[list[Piece]]]:
    """Steps of rows until every document is packed."""
    documents = iter([(0, number, length) for number, length in enumerate(lengths)])
    steps, pending = [], []
    while True:
        rows, pending = pack_rows(
            lambda: next(documents, None), pending, num_rows=num_rows, seq_len=seq_len
        )
        if not any(rows):
            assert not pending
            return steps
        assert len(pending) <= PENDING_LIMIT
        steps.append(rows)


@quick
@given(
    lengths=st.lists(st.integers(1, 70), max_size=200),
    num_rows=st.integers(1, 5),
    seq_len=st.integers(1, 24),
)
def test_each_token_is_packed_once(lengths: list[int], num_rows: int, seq_len: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for rows in pack_all(lengths, num_rows, seq_len):
        assert len(rows) == num_rows
        for row in rows:
            assert sum(piece[LENGTH] for piece in row) <= seq_len
            for _, document, start, length, last in row:
                assert length > 0
                assert start % seq_len == 0, "cuts lie at whole rows from the document's start"
                assert last == (start + length == lengths[document])
                seen.update((document, token) for token in range(start, start + length))
    wanted = {(number, token) for number, length in enumerate(lengths) for token in range(length)}
    assert set(seen) == wanted
    assert set(seen.values()) <= {1}


def test_short_documents_are_never_cut_and_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(10, 800, 3000).tolist()
    steps = pack_all(lengths, num_rows=8, seq_len=2048)
    pieces = [piece for rows in steps for row in rows for piece in row]
    assert sorted(piece[LENGTH] for piece in pieces) == sorted(lengths)
    full = [sum(piece[LENGTH] for row in rows for piece in row) for rows in steps[:-8]]
    assert sum(full) / len(full) > 0.98 * 8 * 2048


def test_the_oldest_waiting_document_comes_first() -> None:
    pending: list[Rest] = [(0, number, 0, 10) for number in range(5)]
    rows, waiting = pack_rows(lambda: (0, 9, 1), pending, num_rows=2, seq_len=10)
    assert [row[0][1] for row in rows] == [0, 1]
    assert [rest[1] for rest in waiting] == [2, 3, 4]


@quick
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 16),
    rows_each=st.integers(1, 4),
)
def test_buffers(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, rows_each: int
) -> None:
    """ids, labels, cu_seqlens and padding against a slow rule, token for token."""
    documents, token = [], 0
    for length in lengths:
        documents.append([(token + offset) % 997 + 1 for offset in range(length)])
        token += length
    split = open_folder(tmp_path_factory.mktemp("packed") / "x", documents)
    for rows in pack_all(lengths, rows_each, seq_len):
        flat = [piece for row in rows for piece in row]
        batch = read_micro_batch(
            np.array(flat, dtype=np.int64), [split], num_tokens=rows_each * seq_len
        )
        check_batch(batch, flat, documents)


def open_folder(path: Path, documents: list[list[int]]) -> PreparedSplit:
    return PreparedSplit(write_folder(path, documents), "train", name="x", vocab_size=1000)


def check_batch(batch: PackedBatch, pieces: list[Piece], documents: list[list[int]]) -> None:
    total = batch.input_ids.shape[1]
    ids, labels, bounds = [], [], [0]
    for _, number, start, length, _ in pieces:
        document = documents[number]
        ids += document[start : start + length]
        after = document[start + 1 : start + length + 1]
        labels += after + [IGNORE_LABEL] * (length - len(after))
        bounds.append(len(ids))
    assert batch.num_tokens == len(ids)
    if len(ids) < total:
        bounds.append(total)
    assert batch.input_ids.tolist() == [ids + [0] * (total - len(ids))]
    assert batch.labels.tolist() == [labels + [IGNORE_LABEL] * (total - len(ids))]
    assert batch.cu_seqlens.tolist() == bounds
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert str(batch.input_ids.dtype) == str(batch.labels.dtype) == "torch.int64"


@quick
@given(size=st.integers(1, 3000), key=st.text(max_size=5), data=st.data())
def test_random_order_is_a_permutation(size: int, key: str, data: st.DataObject) -> None:
    order = RandomOrder(size, key)
    values = order.at(0, size)
    assert sorted(values.tolist()) == list(range(size))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert order.at(start, stop).tolist() == values[start:stop].tolist()


def test_random_order_looks_random() -> None:
    size = 10_000
    values = RandomOrder(size, "a").at(0, size)
    places = np.arange(size)
    assert abs(np.corrcoef(places, values)[0, 1]) < 0.05
    # A random permutation has one fixed point, one rising neighbour and one equal place on average.
    assert (values == places).sum() < 8
    assert (np.diff(values) == 1).sum() < 8
    assert (values == RandomOrder(size, "b").at(0, size)).sum() < 8


def test_random_order_of_a_huge_size() -> None:
    size = 10**12 + 7
    values = RandomOrder(size, "a").at(size - 1000, size)
    assert len(set(values.tolist())) == 1000
    assert 0 <= values.min() < values.max() < size
