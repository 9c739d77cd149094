"""Triton kernels of lightning attention: one scan, used forward and (reversed) backward.

With `l = exp(-slope)`, `scan(a, b, c)` is `out_i = sum_{j <= i} l^(i-j) (a_i . b_j) c_j`, and its
reverse sums over `j >= i`. All four passes of training are that one function:

    out = scan(q, k, v)                  dq = scan(do, v, k)
    dv  = reverse scan(k, q, do)         dk = reverse scan(v, do, q)

**Work.** A row is cut into *chunks* of BLOCK_TOKENS that start anew with each document, so that
none sees two documents; a device table lists them where the row is packed. A program owns (piece,
head, slice of BLOCK_VALUES columns of c), a piece being a run of chunks, and goes over it with the
state, fp32, in registers. At a document's first chunk the old state's weights are 0, so a boundary
costs nothing but the part of a chunk that stays empty. That part lies where the scan has not been
yet: behind the document forward, before it in reverse; so what a chunk writes there is overwritten
by the next one, and no store needs a mask. The state and its products are kept
transposed: then all first operands of the tensor cores that are computed, not loaded, come from
registers, and only the scores pass through shared memory. Tiles come and go through the copy
engine (tensor descriptors), which also cuts off what lies behind the row.

**Phases.** Where rows x heads x slices fill the chip, a piece is a whole row and `scan_kernel`
does everything. Otherwise rows are cut into pieces: (1) `local_state_kernel`, each piece's own
state from b and c, and the decay through it; (2) `carry_kernel`, a short scan over a row's pieces,
which turns these into the states at the cuts; (3) `scan_kernel` from there. Backward reads the
saved states at the cuts for dq and runs phases 1 and 2 once for dk and dv together.

**Decay.** Every exponent is <= 0. In reverse the state that enters is multiplied by l^(tokens up to
the chunk's end), one power fewer than forward: the gradient of a final state meets the last token's
undecayed. So forward weighs (in, out) by (l^(i+1), l^(n-1-i)), reverse by (l^(n-1-i), l^(i+1)), for
offset i in a chunk of n tokens.

The README has the floors and the measurements.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from fulmen.kernels.lightning.triton_chunks import chunk_at, chunks_of, first_inside, rows_between
from fulmen.kernels.triton_common import INTERPRETED, product


@triton.jit
def log2_decay_of(slopes, head):
    """Log2 of the decay a token. The bound makes an infinite slope `l = 0` with `l^0 = 1`."""
    slope = tl.load(slopes + head).to(tl.float32)
    return -1.4426950408889634 * tl.minimum(slope, 1e4)


@triton.jit
def share_of(
    program, first_piece, launched, heads, HEAD_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr
):
    """(row, piece, head, first column of the slice) of a program; `launched` pieces of each row.

    A head's slices are neighbours, so that the second one finds a and b in L2.
    """
    slices: tl.constexpr = HEAD_DIM // BLOCK_VALUES
    column = (program % slices) * BLOCK_VALUES
    head = (program // slices) % heads
    piece = program // (slices * heads)
    return piece // launched, first_piece + piece % launched, head, column


@triton.jit
def rows_of(
    tensor,
    strides,
    row,
    tokens,
    head,
    column,
    BLOCK_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Descriptor of WIDTH columns of a head in a row of a [batch, tokens, heads, head_dim].

    Reads behind the row give 0, writes there do nothing.
    """
    start = tensor + row * tl.cast(strides[0], tl.int64) + head * tl.cast(strides[2], tl.int64)
    return tl.make_tensor_descriptor(
        start + column, [tokens, WIDTH], [strides[1], 1], [BLOCK_TOKENS, WIDTH]
    )


@triton.jit
def chunk_weights(
    log2_decay,
    token,
    count,
    BLOCK_TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """(weight of the entering state, of each token in the leaving state, of old in new state)."""
    if PACKED and REVERSE:  # the chunk's tokens are its last rows
        token = token - (BLOCK_TOKENS - count)
    is_real = (token >= 0) & (token < count)
    to_start = tl.exp2(log2_decay * tl.maximum(token + 1, 0).to(tl.float32))
    to_end = tl.exp2(log2_decay * tl.maximum(count - 1 - token, 0).to(tl.float32))
    to_start = tl.where(is_real, to_start, 0.0)
    to_end = tl.where(is_real, to_end, 0.0)
    carry = tl.exp2(log2_decay * (count + 0.0))
    if REVERSE:
        return to_end, to_start, carry
    else:
        return to_start, to_end, carry


@triton.jit
def state_tile(
    states,
    index,
    heads,
    head,
    first_column,
    HEAD_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Pointers to a program's [BLOCK_VALUES, HEAD_DIM] of a state [index, heads, row, column].

    The program's rows are the scan's columns; TRANSPOSED, memory holds the scan's transposes.
    """
    base = states + (tl.cast(index, tl.int64) * heads + head) * (HEAD_DIM * HEAD_DIM)
    row = tl.arange(0, HEAD_DIM)[None, :]
    column = first_column + tl.arange(0, BLOCK_VALUES)[:, None]
    if TRANSPOSED:
        return base + column * HEAD_DIM + row
    else:
        return base + row * HEAD_DIM + column


@triton.jit
def cut_before(row, piece, pieces, REVERSE: tl.constexpr):
    """(number of the cut that the scan passes into a piece, whether there is one)."""
    cut = piece if REVERSE else piece - 1
    return row * (pieces - 1) + cut, (cut >= 0) & (cut < pieces - 1)


@triton.jit
def await_stores(condition):
    """Waits, if so, until what the copy engine was told to store has arrived, not only left."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred waits;
            setp.ne.u32 waits, $1, 0;
            @waits cp.async.bulk.wait_group 0;
            mov.b32 $0, 0;
            }""",
            "=r,r",
            [condition.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def store_tokens(out, stride, first, count, result):
    """Writes the last `count` rows of a chunk, its tokens; `out` points at row 0."""
    block: tl.constexpr = result.shape[0]
    row = tl.arange(0, block)[:, None]
    tile = out + (first + row) * tl.cast(stride, tl.int64) + tl.arange(0, result.shape[1])[None, :]
    tl.store(tile, result, mask=row + count >= block)


@triton.jit
def chunk_output(a_chunk, b_chunk, c_chunk, state, reach, entering):
    """`out` of one chunk, transposed as `c_chunk` and `state` are."""
    scores = product(b_chunk, tl.trans(a_chunk), None) * reach
    result = product(state.to(a_chunk.dtype), tl.trans(a_chunk), None) * entering[None, :]
    return product(c_chunk, scores.to(c_chunk.dtype), result)


@triton.jit
def reach_of(log2_decay, token, REVERSE: tl.constexpr):
    """`l^|i-j|` where j may reach i, else 0: [j, i]."""
    distance = token[None, :] - token[:, None]
    if REVERSE:
        distance = -distance
    reach = tl.exp2(log2_decay * tl.maximum(distance, 0).to(tl.float32))
    return tl.where(distance >= 0, reach, 0.0)


@triton.jit
def scan(
    a_rows,
    b_rows,
    c_rows,
    out_rows,
    out_columns,
    out_stride,
    out_first,
    state,
    log2_decay,
    outer_states,
    leaving_states,
    chunks,
    begin,
    end,
    row,
    tokens,
    heads,
    head,
    column,
    BLOCK_TOKENS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Runs over chunks of a piece, writes their outputs, returns the state that leaves them.

    MASKED: the chunks begin before the piece, where the copy engine takes no place.
    """
    block_values: tl.constexpr = state.shape[0]
    head_dim: tl.constexpr = state.shape[1]
    token = tl.arange(0, BLOCK_TOKENS)
    reach = reach_of(log2_decay, token, REVERSE)
    for step in range(end - begin):
        index = end - 1 - step if REVERSE else begin + step
        first, count, sequence, opens, closes = chunk_at(
            chunks, index, row, tokens, BLOCK_TOKENS, PACKED
        )
        a_chunk = a_rows.load([first, 0])
        b_chunk = b_rows.load([first, 0])
        c_chunk = tl.trans(c_rows.load([first, 0]))
        entering, leaving, carry = chunk_weights(
            log2_decay, token, count, BLOCK_TOKENS, PACKED, REVERSE
        )
        if PACKED:
            starts = closes if REVERSE else opens
            if not HAS_OUTER:
                entering = tl.where(starts, 0.0, entering)
                carry = tl.where(starts, 0.0, carry)
            elif starts:
                tile = state_tile(
                    outer_states, sequence, heads, head, column, head_dim, block_values, TRANSPOSED
                )
                state = tl.load(tile)
        result = chunk_output(a_chunk, b_chunk, c_chunk, state, reach, entering)
        if PACKED and not MASKED:
            # The previous document's last chunk may have written over this one's rows; a document's
            # other chunks follow full ones.
            await_stores(starts)
        result = tl.trans(result).to(a_chunk.dtype)
        if MASKED:
            store_tokens(out_columns, out_stride, first - out_first, count, result)
        else:
            # An empty document's chunk has no row of its own: what it computed goes where none is.
            place = tl.where(count == 0, tokens + BLOCK_TOKENS, first - out_first)
            out_rows.store([place, 0], result)
        weighed = (c_chunk.to(tl.float32) * leaving[None, :]).to(c_chunk.dtype)
        state = product(weighed, b_chunk, state * carry)
        if STORE_LEAVING and PACKED and (opens if REVERSE else closes):
            tile = state_tile(
                leaving_states, sequence, heads, head, column, head_dim, block_values, TRANSPOSED
            )
            tl.store(tile, state)
    return state


RUNTIME_SIZES = [
    "tokens", "pieces", "first_piece", "launched", "piece_chunks", "num_entries", "heads",
]  # fmt: skip
"""Sizes that change from call to call: no new compilation for a length that is 1 or odd."""


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def scan_kernel(
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
    chunks,
    tokens,
    pieces,
    first_piece,
    launched,
    piece_chunks,
    num_entries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    PART: tl.constexpr,
    IS_CUT: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
    STORE_CUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 3. Grid: rows x launched pieces x heads x slices, the slices fastest.

    `out` is contiguous. `outer_states`, one per sequence (with PART one, which enters the row),
    enter its first chunk in the order of the scan (zero unless HAS_OUTER); `cut_states` [rows,
    pieces - 1] enter pieces, and with STORE_CUT receive what leaves them; `leaving_states`, one per
    sequence, are written after its last chunk if STORE_LEAVING. TRANSPOSED: memory holds the scan's
    states transposed. PADDED: a chunk of rows before `out` may be written; pieces run in turn.
    """
    row, piece, head, column = share_of(
        tl.program_id(0), first_piece, launched, heads, HEAD_DIM, BLOCK_VALUES
    )
    begin, end = chunks_of(piece, tokens, piece_chunks, chunks, num_entries, BLOCK_TOKENS, PACKED)
    log2_decay = log2_decay_of(slopes, head)
    a_rows = rows_of(a, a_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
    b_rows = rows_of(b, b_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
    c_rows = rows_of(c, c_strides, row, tokens, head, column, BLOCK_TOKENS, BLOCK_VALUES)
    out_strides = (tl.cast(tokens, tl.int64) * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM)
    # What chunks write beside their tokens must not reach another program's.
    out_first, out_length = rows_between(
        chunks, begin, end, tokens, BLOCK_TOKENS, PACKED, PADDED, REVERSE
    )
    out_start = out + out_first * tl.cast(out_strides[1], tl.int64)
    out_rows = rows_of(
        out_start, out_strides, row, out_length, head, column, BLOCK_TOKENS, BLOCK_VALUES
    )
    state = tl.zeros([BLOCK_VALUES, HEAD_DIM], dtype=tl.float32)
    cut, is_inside = cut_before(row, piece, pieces, REVERSE)
    if IS_CUT:
        tile = state_tile(cut_states, cut, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED)
        state = tl.load(tile, mask=is_inside, other=0.0)
    # A branch in the loop is slow, so that of states that enter a row stands outside.
    if HAS_OUTER and (PART or not PACKED):
        tile = state_tile(
            outer_states, row, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED
        )
        state += tl.load(tile, mask=is_inside == 0, other=0.0)
    # Chunks that begin before the piece come in a loop of their own: a branch costs the pipeline.
    two_parts: tl.constexpr = PACKED and REVERSE and not PADDED
    inside = first_inside(chunks, begin, end, out_first) if two_parts else begin
    for part in tl.static_range(2 if two_parts else 1):
        if part == 1:
            await_stores(inside >= 0)  # others will write over what the copy engine stored
            tl.debug_barrier()
        state = scan(
            a_rows,
            b_rows,
            c_rows,
            out_rows,
            out_start + row * out_strides[0] + head * HEAD_DIM + column,
            out_strides[1],
            out_first,
            state,
            log2_decay,
            outer_states,
            leaving_states,
            chunks,
            begin if part == 1 else inside,
            inside if part == 1 else end,
            row,
            tokens,
            heads,
            head,
            column,
            BLOCK_TOKENS,
            PACKED,
            HAS_OUTER and not PART,
            STORE_LEAVING,
            TRANSPOSED,
            part == 1,
            REVERSE,
        )
    cut, is_inside = cut_before(row, piece - 1 if REVERSE else piece + 1, pieces, REVERSE)
    if STORE_CUT:
        tile = state_tile(cut_states, cut, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED)
        tl.store(tile, state, mask=is_inside)
    if STORE_LEAVING and not PACKED:
        tile = state_tile(
            leaving_states, row, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED
        )
        tl.store(tile, state, mask=is_inside == 0)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def local_state_kernel(
    b,
    c,
    b_strides,
    c_strides,
    slopes,
    outer_states,
    states,
    decays,
    chunks,
    tokens,
    pieces,
    first_piece,
    launched,
    piece_chunks,
    num_entries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    PART: tl.constexpr,
    TO_EDGE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 1: the state at each cut were nothing before the piece that leads to it.

    `states` [rows, pieces - 1, heads, HEAD_DIM, HEAD_DIM] as dv's scan has them, `decays` [rows,
    pieces - 1, heads] what remains of a state that enters the piece (0 if a document starts there).
    Grid as in `scan_kernel`; the last piece in the order of the scan has no cut behind it.
    TO_EDGE (not packed): only the state at the end of the row is wanted, which is the last piece's:
    `pieces` replaces `pieces - 1`, and what does not reach that end is not read.
    """
    row, piece, head, column = share_of(
        tl.program_id(0), first_piece, launched, heads, HEAD_DIM, BLOCK_VALUES
    )
    place, is_inside = cut_before(row, piece - 1 if REVERSE else piece + 1, pieces, REVERSE)
    if TO_EDGE:
        place, is_inside = row * pieces + piece, piece < pieces
    if is_inside:
        begin, end = chunks_of(
            piece, tokens, piece_chunks, chunks, num_entries, BLOCK_TOKENS, PACKED
        )
        log2_decay = log2_decay_of(slopes, head)
        b_rows = rows_of(b, b_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
        c_rows = rows_of(c, c_strides, row, tokens, head, column, BLOCK_TOKENS, BLOCK_VALUES)
        token = tl.arange(0, BLOCK_TOKENS)
        # Tokens whose weight is below the least normal fp32 (2^-126) are not read: fast heads only
        # need a piece's last few chunks. A chunk that is not full ends a document, so counting
        # chunks as full leaves none out that matters.
        visible = tl.minimum(127.0 / tl.maximum(-log2_decay, 1e-6), 1e9).to(tl.int32)
        needed = tl.cdiv(visible, BLOCK_TOKENS) + 1
        if TO_EDGE:
            behind = begin if REVERSE else tl.cdiv(tokens, BLOCK_TOKENS) - end
            needed = tl.maximum(needed - behind, 0)
        needed = tl.minimum(end - begin, needed)
        state = tl.zeros([BLOCK_VALUES, HEAD_DIM], dtype=tl.float32)
        if HAS_OUTER and PART:
            _cut, has_cut = cut_before(row, piece, pieces, REVERSE)
            tile = state_tile(outer_states, row, heads, head, column, HEAD_DIM, BLOCK_VALUES, False)
            state += tl.load(tile, mask=has_cut == 0, other=0.0)
        decay = tl.where(needed < end - begin, 0.0, 1.0)
        for step in range(needed):
            index = begin + needed - 1 - step if REVERSE else end - needed + step
            first, count, sequence, opens, closes = chunk_at(
                chunks, index, row, tokens, BLOCK_TOKENS, PACKED
            )
            b_chunk = b_rows.load([first, 0])
            c_chunk = tl.trans(c_rows.load([first, 0]))
            _entering, leaving, carry = chunk_weights(
                log2_decay, token, count, BLOCK_TOKENS, PACKED, REVERSE
            )
            starts = closes if REVERSE else opens
            decay = tl.where(starts, 0.0, decay * carry)
            if HAS_OUTER and not PART:
                if starts:
                    state = tl.load(
                        state_tile(
                            outer_states, sequence, heads, head, column,
                            HEAD_DIM, BLOCK_VALUES, False,
                        )
                    )  # fmt: skip
            else:
                carry = tl.where(starts, 0.0, carry)
            weighed = (c_chunk.to(tl.float32) * leaving[None, :]).to(c_chunk.dtype)
            state = product(weighed, b_chunk, state * carry)
        tl.store(
            state_tile(states, place, heads, head, column, HEAD_DIM, BLOCK_VALUES, False), state
        )
        if column == 0:
            tl.store(decays + place * heads + head, decay)


@triton.jit(do_not_specialize=["cuts", "heads"])
def carry_kernel(
    states,
    decays,
    cuts,
    heads,
    STATE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 2: adds to each cut's state what the cuts before it leave of theirs, in place.

    Grid: rows x heads x parts of BLOCK numbers, the parts fastest.
    """
    parts: tl.constexpr = STATE_SIZE // BLOCK
    program = tl.program_id(0)
    within = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    head = (program // parts) % heads
    row = program // (parts * heads)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(cuts):
        place = (row * cuts + (cuts - 1 - step if REVERSE else step)) * heads + head
        here = states + tl.cast(place, tl.int64) * STATE_SIZE + within
        state = state * tl.load(decays + place) + tl.load(here)
        tl.store(here, state)
