"""The chunks of a row, on the device: where each begins, what it holds, which of them are whose.

A row that is not packed has chunks at multiples of BLOCK_TOKENS. A packed one has a table, written
by `chunk_table_kernel` and read by the others.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def chunks_of(
    piece,
    tokens,
    piece_chunks,
    chunks,
    num_entries,
    BLOCK_TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(first, end) of a piece's chunks."""
    if PACKED:
        total = tl.load(chunks + 4 * num_entries)
    else:
        total = tl.cdiv(tokens, BLOCK_TOKENS)
    first = piece * piece_chunks
    return first, tl.maximum(tl.minimum(first + piece_chunks, total), first)


@triton.jit
def chunk_at(chunks, index, row, tokens, BLOCK_TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """(first row, number of tokens, sequence, is its first, is its last) of a chunk."""
    if PACKED:
        entry = chunks + 4 * index
        edges = tl.load(entry + 3)
        first = tl.load(entry)
        return first, tl.load(entry + 1), tl.load(entry + 2), (edges & 1) != 0, edges >= 2
    else:
        first = index * BLOCK_TOKENS
        count = tl.minimum(tokens - first, BLOCK_TOKENS)
        return first, count, row, index == 0, first + BLOCK_TOKENS >= tokens


@triton.jit
def first_inside(chunks, begin, end, first_row):
    """First of a piece's chunks with no row before the piece's; their rows rise."""
    block: tl.constexpr = 128
    outside = 0
    for start in range(begin, end, block):
        index = start + tl.arange(0, block)
        row = tl.load(chunks + 4 * index, mask=index < end, other=2**30)
        outside += tl.sum((row < first_row).to(tl.int32), axis=0)
    return begin + outside


@triton.jit
def rows_between(
    chunks,
    begin,
    end,
    tokens,
    BLOCK_TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """(first, number) of the rows that a piece may write; at least one."""
    first = -BLOCK_TOKENS if PADDED else 0
    behind = tokens
    if PACKED and not PADDED:
        last = tl.maximum(end - 1, begin)
        first = tl.load(chunks + 4 * begin)
        behind = tl.load(chunks + 4 * last) + BLOCK_TOKENS
        if REVERSE:
            first += BLOCK_TOKENS - tl.load(chunks + 4 * begin + 1)
        else:
            behind += tl.load(chunks + 4 * last + 1) - BLOCK_TOKENS
    return first, tl.maximum(behind - first, 1)


@triton.jit(do_not_specialize=["num_sequences", "num_entries"])
def chunk_table_kernel(
    cu_seqlens,
    chunks,
    num_sequences,
    num_entries,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    PART: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """`chunks[n] = (first row, tokens, sequence, is first + 2 * is last)` of a packed row.

    A document's last chunk may hold fewer tokens than rows, in REVERSE its first: there its tokens
    are the chunk's last rows. `chunks[num_entries, 0]` is their number; entries between are not
    written. An empty document has one (empty) chunk, so that its state passes through.

    PART: the scan comes to the row with a state, so its first document does not start there.
    """
    entry = tl.program_id(0) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    sequence = tl.zeros([BLOCK_ENTRIES], dtype=tl.int32)
    first_of = tl.zeros([BLOCK_ENTRIES], dtype=tl.int32)
    before = 0
    for start in range(0, num_sequences, BLOCK_SEQUENCES):
        index = start + tl.arange(0, BLOCK_SEQUENCES)
        real = index < num_sequences
        begin = tl.load(cu_seqlens + index, mask=real, other=0)
        length = tl.load(cu_seqlens + index + 1, mask=real, other=0) - begin
        count = tl.where(real, tl.maximum(tl.cdiv(length, BLOCK_TOKENS), 1), 0)
        through = before + tl.cumsum(count, axis=0)
        passed = (through[None, :] <= entry[:, None]) & real[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        first_of = tl.maximum(first_of, tl.max(tl.where(passed, through[None, :], 0), axis=1))
        before += tl.sum(count, axis=0)
    used = sequence < num_sequences
    begin = tl.load(cu_seqlens + sequence, mask=used, other=0)
    end = tl.load(cu_seqlens + sequence + 1, mask=used, other=0)
    before_it = entry - first_of
    behind_it = tl.maximum(tl.cdiv(end - begin, BLOCK_TOKENS), 1) - 1 - before_it
    if REVERSE:
        first = end - (behind_it + 1) * BLOCK_TOKENS
        count = tl.minimum(first + BLOCK_TOKENS - begin, BLOCK_TOKENS)
    else:
        first = begin + before_it * BLOCK_TOKENS
        count = tl.minimum(end - first, BLOCK_TOKENS)
    is_first, is_last = before_it == 0, behind_it == 0
    if PART and REVERSE:
        is_last &= sequence < num_sequences - 1
    elif PART:
        is_first &= sequence > 0
    edges = is_first.to(tl.int32) + 2 * is_last.to(tl.int32)
    tl.store(chunks + 4 * entry, first, mask=used)
    tl.store(chunks + 4 * entry + 1, count, mask=used)
    tl.store(chunks + 4 * entry + 2, sequence, mask=used)
    tl.store(chunks + 4 * entry + 3, edges, mask=used)
    if tl.program_id(0) == 0:
        tl.store(chunks + 4 * num_entries, before)
