"""Triton kernels of lightning attention: one scan, used forward and (reversed) backward.

With `l = exp(-slope)`, `scan(a, b, c)` is `out_i = sum_{j <= i} l^(i-j) (a_i . b_j) c_j`, and its
reverse sums over `j >= i`. All four passes of training are that one function:

    out = scan(q, k, v)                  dq = scan(do, v, k)
    dv  = reverse scan(k, q, do)         dk = reverse scan(v, do, q)

**Work.** Tokens are cut into *segments* that never cross a document; a segment's chunks of
BLOCK_TOKENS are aligned to its first token. So no chunk sees two documents and the inner loop masks
nothing but the segment's tail: packing costs half a chunk a document, and no look-up a token. The
alternative, chunks on a fixed grid masked by document, cannot take or give a state per document
without a loop over the documents inside a chunk. One program owns (segment, head, slice of
BLOCK_VALUES columns of c) and runs over its chunks with the state, [HEAD_DIM, BLOCK_VALUES] fp32,
in registers.

**Phases.** Where sequences x heads x slices fill the chip, a segment is a whole document and
`forward_kernel` alone does everything. Otherwise long documents are cut: (1) `local_state_kernel`,
each segment's own state from b and c; (2) `carry_kernel`, a short scan over a document's segments
(`S <- l^n S + local`), which turns these into the states at the cuts; (3) `forward_kernel` from
there. States are kept per cut, not per segment: at most tokens / segment length of them however
many documents there are, and short documents pass phases 1 and 2 for nothing. The final state
leaves in phase 3. Backward reads the saved states at the cuts for dq and runs phases 1 and 2 once
for dk and dv together.

**Decay.** Every exponent is <= 0. In reverse the state that enters is multiplied by l^(tokens up to
the segment's end), one power fewer than forward: the gradient of a final state meets the last
token's undecayed. So forward weighs (in, out) by (l^(i+1), l^(n-1-i)), reverse by
(l^(n-1-i), l^(i+1)), for offset i in a chunk of n tokens.

**Floor** on an H200 (4.30 TB/s copy, 790 TFLOP/s bf16), H 64, D 128, T 32768, bf16, chunks of 64,
slices of 64. One tensor is 0.537 GB = 0.125 ms. C = chunk; FLOP are per token and head, in tens of
thousands; "L2" is what all programs load and store, both slices reading a and b.

| pass | memory, tensors | L2, tensors | FLOP | memory ms | FLOP ms |
|---|---|---|---|---|---|
| forward, uncut | q k v out = 4 | 2(q k) v out = 6 | 2(2CD + CD + 2DD) = 11.5 | 0.50 | 0.30 |
| dq | 4 | 6 | 11.5 | 0.50 | 0.30 |
| dk and dv | 4 + 2 = 6 | 12 | 22.9 | 0.75 | 0.61 |
| phase 1, if cut | b c = 2 | 3 | 2DD = 3.3 | 0.25 | 0.09 |
| phase 2, if cut | 128 KiB a cut and head | as memory | - | 0.01 | - |

So 0.50 ms forward and 1.75 ms in all is the floor; through L2 (5.5 TB/s, from elsewhere) it is 0.59
and 2.34 ms, so L2 bounds this design. Compiled for sm_90 by Triton 3.6 and 3.7, a chunk takes 670
to 730 instructions a warp plus 900 cycles of tensor cores, one after the other (Triton waits for
each product): near 2000 cycles, 512 chunks, 0.55 ms forward at 1.9 GHz with a program per SM, as
much for dq, and less than twice that for dk and dv, two per SM: about 2.0 ms in all. Predicted, not
yet measured. Cutting everything to fill more than one program per SM forward moves k and v once
more (5 to 6 tensors, 0.63 to 0.75 ms): not done where heads fill the chip. What could be tried
next: BLOCK_VALUES = HEAD_DIM, 8 warps and two segments (5 tensors, QK^T once), a table row; slices
as a cluster with multicast loads, which needs CUDA C++.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, accumulator):
    """`accumulator + a @ b` in fp32, exact for fp32 operands (no tf32)."""
    # Triton's interpreter keeps bf16 as 16-bit integers and would multiply those.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def log2_decay_of(slopes, head):
    """Log2 of the decay a token. The bound makes an infinite slope `l = 0` with `l^0 = 1`."""
    slope = tl.load(slopes + head).to(tl.float32)
    return -1.4426950408889634 * tl.minimum(slope, 1e4)


@triton.jit
def share_of(program, heads, HEAD_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr):
    """(segment, head, first column of the slice) of a program.

    A head's slices are neighbours, so that the second one finds a and b in L2.
    """
    slices: tl.constexpr = HEAD_DIM // BLOCK_VALUES
    column = (program % slices) * BLOCK_VALUES
    return program // (slices * heads), (program // slices) % heads, column


@triton.jit
def segment_bounds(
    segment, cu_seqlens, table, tokens, segment_tokens, segments_per_row, PACKED: tl.constexpr
):
    """(sequence, row of the batch, first token, end, is first and is last of its sequence).

    The sequence is -1 for the places of the table that no document needed.
    """
    if PACKED:
        sequence = tl.load(table + 2 * segment)
        index = tl.load(table + 2 * segment + 1)
        begin = tl.load(cu_seqlens + tl.maximum(sequence, 0))
        limit = tl.load(cu_seqlens + tl.maximum(sequence, 0) + 1)
        row = sequence * 0
    else:
        sequence = segment // segments_per_row
        index = segment % segments_per_row
        begin = index * 0
        limit = begin + tokens
        row = sequence
    first = begin + index * segment_tokens
    end = tl.minimum(first + segment_tokens, limit)
    return sequence, row, first, end, index == 0, end == limit


@triton.jit
def at(tensor, strides, row, first, head):
    """Pointer to a head's first number at a token of a [batch, tokens, heads, head_dim] tensor."""
    return (
        tensor
        + row * tl.cast(strides[0], tl.int64)
        + first * tl.cast(strides[1], tl.int64)
        + head * tl.cast(strides[2], tl.int64)
    )


@triton.jit
def chunk_weights(log2_decay, token, count, REVERSE: tl.constexpr):
    """(weight of the entering state, of each token in the leaving state, of old in new state)."""
    to_start = tl.exp2(log2_decay * (token + 1).to(tl.float32))
    to_end = tl.exp2(log2_decay * tl.maximum(count - 1 - token, 0).to(tl.float32))
    carry = tl.exp2(log2_decay * (count + 0.0))
    if REVERSE:
        return to_end, to_start, carry
    else:
        return to_start, to_end, carry


@triton.jit
def scan(
    a,
    b,
    c,
    out,
    a_stride,
    b_stride,
    c_stride,
    out_stride,
    state,
    log2_decay,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Runs over one segment's chunks, writes its outputs, returns the state that leaves.

    Pointers stand at the segment's first token, `c` and `out` at the slice's first column; strides
    are those of tokens; `state` is [HEAD_DIM, BLOCK_VALUES] fp32.
    """
    token = tl.arange(0, BLOCK_TOKENS)
    wide = tl.arange(0, HEAD_DIM)[None, :]
    narrow = tl.arange(0, BLOCK_VALUES)[None, :]
    distance = token[:, None] - token[None, :]
    if REVERSE:
        distance = -distance
    reach = tl.exp2(log2_decay * tl.maximum(distance, 0).to(tl.float32))
    reach = tl.where(distance >= 0, reach, 0.0)
    a_tile = token[:, None] * a_stride + wide
    b_tile = token[:, None] * b_stride + wide
    c_tile = token[:, None] * c_stride + narrow
    out_tile = token[:, None] * out_stride + narrow
    num_chunks = tl.cdiv(length, BLOCK_TOKENS)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index if REVERSE else index
        first = chunk * BLOCK_TOKENS
        count = tl.minimum(length - first, BLOCK_TOKENS)
        keep = token[:, None] < count
        a_chunk = tl.load(a + first * tl.cast(a_stride, tl.int64) + a_tile, mask=keep, other=0.0)
        b_chunk = tl.load(b + first * tl.cast(b_stride, tl.int64) + b_tile, mask=keep, other=0.0)
        c_chunk = tl.load(c + first * tl.cast(c_stride, tl.int64) + c_tile, mask=keep, other=0.0)
        entering, leaving, carry = chunk_weights(log2_decay, token, count, REVERSE)

        scores = product(a_chunk, tl.trans(b_chunk), None) * reach
        result = product(a_chunk, state.to(a_chunk.dtype), None) * entering[:, None]
        result = product(scores.to(c_chunk.dtype), c_chunk, result)
        out_chunk = out + first * tl.cast(out_stride, tl.int64) + out_tile
        tl.store(out_chunk, result.to(out.dtype.element_ty), mask=keep)
        # The narrow operand is weighed, not b: half the arithmetic, and b stays where it is.
        weighed = (c_chunk.to(tl.float32) * leaving[:, None]).to(c_chunk.dtype)
        state = product(tl.trans(b_chunk), weighed, state * carry)
    return state


@triton.jit
def cut_before(segment, sequence):
    """Number of the cut at a segment's first token; the cut at its end is the next one.

    All sequences' cuts are numbered through: each sequence has one fewer than segments.
    """
    return segment - sequence - 1


@triton.jit
def state_tile(
    states,
    index,
    heads,
    head,
    first_column,
    row_stride,
    column_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Pointers to [HEAD_DIM, BLOCK_VALUES] of a state in [index, heads, HEAD_DIM, HEAD_DIM]."""
    base = states + (tl.cast(index, tl.int64) * heads + head) * (HEAD_DIM * HEAD_DIM)
    row = tl.arange(0, HEAD_DIM)[:, None]
    column = first_column + tl.arange(0, BLOCK_VALUES)[None, :]
    return base + row * row_stride + column * column_stride


@triton.jit
def scan_slice(
    a,
    b,
    c,
    out,
    a_strides,
    b_strides,
    c_strides,
    slopes,
    outer_states,
    cut_states,
    leaving_states,
    row_stride,
    column_stride,
    stores_leaving,
    cu_seqlens,
    table,
    tokens,
    segment_tokens,
    segments_per_row,
    heads,
    program,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    IS_CUT: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One program's whole work: a slice of one head of one segment.

    `out` is contiguous. `outer_states`, one per sequence, enter its first segment in the order of
    the scan (zero unless HAS_OUTER); `cut_states`, one per cut, enter the others;
    `leaving_states`, one per sequence, are written by its last segment if STORE_LEAVING and
    `stores_leaving`. The strides of a state's rows and columns tell whether memory holds the scan's
    states or their transposes.
    """
    segment, head, column = share_of(program, heads, HEAD_DIM, BLOCK_VALUES)
    sequence, row, first, end, is_first, is_last = segment_bounds(
        segment, cu_seqlens, table, tokens, segment_tokens, segments_per_row, PACKED
    )
    if sequence >= 0:
        if HAS_OUTER or IS_CUT:
            at_edge = is_last if REVERSE else is_first
            states = tl.where(at_edge, outer_states, cut_states)
            index = tl.where(at_edge, sequence, cut_before(segment, sequence) + REVERSE)
            tile = state_tile(
                states, index, heads, head, column, row_stride, column_stride,
                HEAD_DIM, BLOCK_VALUES,
            )  # fmt: skip
            state = tl.load(tile, mask=tl.where(at_edge, HAS_OUTER, IS_CUT), other=0.0)
        else:
            state = tl.zeros([HEAD_DIM, BLOCK_VALUES], dtype=tl.float32)
        out_token = heads * HEAD_DIM
        out_row = tl.cast(tokens, tl.int64) * out_token
        state = scan(
            at(a, a_strides, row, first, head),
            at(b, b_strides, row, first, head),
            at(c, c_strides, row, first, head) + column,
            at(out, (out_row, out_token, HEAD_DIM), row, first, head) + column,
            a_strides[1],
            b_strides[1],
            c_strides[1],
            out_token,
            state,
            log2_decay_of(slopes, head),
            end - first,
            HEAD_DIM,
            BLOCK_TOKENS,
            BLOCK_VALUES,
            REVERSE,
        )
        if STORE_LEAVING and stores_leaving and (is_first if REVERSE else is_last):
            tile = state_tile(
                leaving_states, sequence, heads, head, column, row_stride, column_stride,
                HEAD_DIM, BLOCK_VALUES,
            )  # fmt: skip
            tl.store(tile, state)


RUNTIME_SIZES = ["tokens", "segment_tokens", "segments_per_row", "heads"]
"""Sizes that change from call to call: no new compilation for a length that is 1 or odd."""


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def forward_kernel(
    q,
    k,
    v,
    out,
    q_strides,
    k_strides,
    v_strides,
    slopes,
    outer_states,
    cut_states,
    leaving_states,
    cu_seqlens,
    table,
    tokens,
    segment_tokens,
    segments_per_row,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    IS_CUT: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Phase 3 in the order of tokens. Grid: segments x heads x slices, the slices fastest.

    Also gives dq, from (do, v, k) and the same states, TRANSPOSED.
    """
    scan_slice(
        q,
        k,
        v,
        out,
        q_strides,
        k_strides,
        v_strides,
        slopes,
        outer_states,
        cut_states,
        leaving_states,
        1 if TRANSPOSED else HEAD_DIM,
        HEAD_DIM if TRANSPOSED else 1,
        True,
        cu_seqlens,
        table,
        tokens,
        segment_tokens,
        segments_per_row,
        heads,
        tl.program_id(0),
        HEAD_DIM,
        BLOCK_TOKENS,
        BLOCK_VALUES,
        PACKED,
        HAS_OUTER,
        IS_CUT,
        STORE_LEAVING,
        False,
    )


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def local_state_kernel(
    b,
    c,
    b_strides,
    c_strides,
    slopes,
    states,
    cu_seqlens,
    table,
    tokens,
    segment_tokens,
    segments_per_row,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 1: `states[cut] = sum_j l^(distance to the cut) b_j c_j^T` over one segment.

    It is the segment before the cut, in the order of the scan; a segment with no cut behind it does
    nothing. Grid as in `forward_kernel`.
    """
    segment, head, column = share_of(tl.program_id(0), heads, HEAD_DIM, BLOCK_VALUES)
    sequence, row, first, end, is_first, is_last = segment_bounds(
        segment, cu_seqlens, table, tokens, segment_tokens, segments_per_row, PACKED
    )
    if sequence >= 0 and not (is_first if REVERSE else is_last):
        log2_decay = log2_decay_of(slopes, head)
        b_start = at(b, b_strides, row, first, head)
        c_start = at(c, c_strides, row, first, head) + column
        token = tl.arange(0, BLOCK_TOKENS)
        b_tile = token[:, None] * b_strides[1] + tl.arange(0, HEAD_DIM)[None, :]
        c_tile = token[:, None] * c_strides[1] + tl.arange(0, BLOCK_VALUES)[None, :]
        state = tl.zeros([HEAD_DIM, BLOCK_VALUES], dtype=tl.float32)
        # Tokens whose weight is below the least normal fp32 (2^-126) are not read: fast heads of a
        # long segment only need its last few chunks.
        num_chunks = tl.cdiv(end - first, BLOCK_TOKENS)
        visible = tl.minimum(127.0 / tl.maximum(-log2_decay, 1e-6), 1e9).to(tl.int32)
        needed = tl.minimum(num_chunks, tl.cdiv(visible, BLOCK_TOKENS) + 1)
        for index in range(needed):
            chunk = needed - 1 - index if REVERSE else num_chunks - needed + index
            offset = chunk * BLOCK_TOKENS
            count = tl.minimum(end - first - offset, BLOCK_TOKENS)
            keep = token[:, None] < count
            b_chunk = tl.load(
                b_start + offset * tl.cast(b_strides[1], tl.int64) + b_tile, mask=keep, other=0.0
            )
            c_chunk = tl.load(
                c_start + offset * tl.cast(c_strides[1], tl.int64) + c_tile, mask=keep, other=0.0
            )
            _entering, leaving, carry = chunk_weights(log2_decay, token, count, REVERSE)
            weighed = (c_chunk.to(tl.float32) * leaving[:, None]).to(c_chunk.dtype)
            state = product(tl.trans(b_chunk), weighed, state * carry)
        cut = cut_before(segment, sequence) + (0 if REVERSE else 1)
        tile = state_tile(states, cut, heads, head, column, HEAD_DIM, 1, HEAD_DIM, BLOCK_VALUES)
        tl.store(tile, state)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def carry_kernel(
    states,
    outer_states,
    slopes,
    cu_seqlens,
    first_segments,
    tokens,
    segment_tokens,
    segments_per_row,
    heads,
    STATE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 2: adds to each cut's state all that was before its segment, in place.

    Grid: sequences x heads x parts of BLOCK numbers, the parts fastest.
    """
    parts: tl.constexpr = STATE_SIZE // BLOCK
    program = tl.program_id(0)
    within = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    head = (program // parts) % heads
    sequence = program // (parts * heads)
    if PACKED:
        length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
        first = tl.load(first_segments + sequence)
    else:
        length = sequence * 0 + tokens
        first = sequence * segments_per_row
    count = tl.maximum(tl.cdiv(length, segment_tokens), 1)
    log2_decay = log2_decay_of(slopes, head)
    if HAS_OUTER:
        outer = (tl.cast(sequence, tl.int64) * heads + head) * STATE_SIZE
        state = tl.load(outer_states + outer + within)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(count - 1):
        index = count - 1 - step if REVERSE else step
        cut = cut_before(first + index, sequence) + (0 if REVERSE else 1)
        here = states + (tl.cast(cut, tl.int64) * heads + head) * STATE_SIZE + within
        size = tl.minimum(length - index * segment_tokens, segment_tokens)
        state = state * tl.exp2(log2_decay * (size + 0.0)) + tl.load(here)
        tl.store(here, state)


@triton.jit(do_not_specialize=["num_sequences", "num_segments", "segment_tokens"])
def segment_table_kernel(
    cu_seqlens,
    table,
    first_segments,
    num_sequences,
    num_segments,
    segment_tokens,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    """`table[segment] = (sequence or -1, index in it)` and each sequence's first segment.

    An empty document has one (empty) segment, so that its state passes through.
    """
    segment = tl.program_id(0) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    sequence = tl.zeros([BLOCK_SEGMENTS], dtype=tl.int32)
    first_of = tl.zeros([BLOCK_SEGMENTS], dtype=tl.int32)
    before = 0
    for start in range(0, num_sequences, BLOCK_SEQUENCES):
        index = start + tl.arange(0, BLOCK_SEQUENCES)
        real = index < num_sequences
        begin = tl.load(cu_seqlens + index, mask=real, other=0)
        length = tl.load(cu_seqlens + index + 1, mask=real, other=0) - begin
        count = tl.where(real, tl.maximum(tl.cdiv(length, segment_tokens), 1), 0)
        through = before + tl.cumsum(count, axis=0)
        passed = (through[None, :] <= segment[:, None]) & real[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        first_of = tl.maximum(first_of, tl.max(tl.where(passed, through[None, :], 0), axis=1))
        before += tl.sum(count, axis=0)
    kept = segment < num_segments
    used = kept & (sequence < num_sequences)
    tl.store(table + 2 * segment, tl.where(used, sequence, -1), mask=kept)
    tl.store(table + 2 * segment + 1, segment - first_of, mask=kept)
    tl.store(first_segments + sequence, segment, mask=used & (segment == first_of))
