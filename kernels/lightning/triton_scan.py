"""Triton kernels of lightning attention: one scan, used forward and (reversed) backward.

With `l = exp(-slope)`, `scan(a, b, c)` is `out_i = sum_{j <= i} l^(i-j) (a_i . b_j) c_j`, and its
reverse sums over `j >= i`. All four passes of training are that one function:

    out = scan(q, k, v)                  dq = scan(do, v, k)
    dv  = reverse scan(k, q, do)         dk = reverse scan(v, do, q)

**Work.** A row is cut into *chunks* of BLOCK_TOKENS. A program owns (piece, head, slice of
BLOCK_VALUES columns of c), a piece being a run of chunks, and goes over it with the state, fp32, in
registers. The state and its products are kept transposed: then all first operands of the tensor
cores that are computed, not loaded, come from registers, and only the scores pass through shared
memory. Tiles come and go through the copy engine (tensor descriptors), which also cuts off what
lies behind the row.

**Documents.** A chunk may hold parts of several. Scores between documents become 0; the entering
state meets the tokens of the document that comes in with it; the leaving state takes those of the
document that goes out. All of it is weights, from a word of bits for each chunk
(triton_documents.py): no branch, and no look-up before a load.

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

from fulmen.kernels.lightning.triton_documents import highest_bit, in_one_document, lowest_bit
from fulmen.kernels.triton_common import product


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
def chunks_of(piece, tokens, piece_chunks, BLOCK_TOKENS: tl.constexpr):
    """(first, end) of a piece's chunks."""
    first = piece * piece_chunks
    return first, tl.minimum(first + piece_chunks, tl.cdiv(tokens, BLOCK_TOKENS))


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
def chunk_weights(log2_decay, count, word, BLOCK_TOKENS: tl.constexpr, REVERSE: tl.constexpr):
    """(weight of the entering state, of each token in the leaving state, of old in new state)."""
    token = tl.arange(0, BLOCK_TOKENS)
    to_start = tl.exp2(log2_decay * (token + 1).to(tl.float32))
    to_end = tl.exp2(log2_decay * tl.maximum(count - 1 - token, 0).to(tl.float32))
    carry = tl.exp2(log2_decay * (count + 0.0))
    low, high = lowest_bit(word), highest_bit(word)
    carry = tl.where(word == 0, carry, 0.0)
    # 0 where a document's bound lies between the token and the chunk's edge.
    if REVERSE:  # bits at last tokens
        to_start = tl.where(token <= low, to_start, 0.0)
        to_end = tl.where(token > high, to_end, 0.0)
        return to_end, to_start, carry
    else:  # bits at first tokens
        to_start = tl.where(token < low, to_start, 0.0)
        to_end = tl.where(token >= high, to_end, 0.0)
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
def word_of(words, index, PACKED: tl.constexpr):
    """A chunk's documents; the table has an entry before its first and behind its last chunk."""
    if PACKED:
        return tl.load(words + 1 + index)
    else:
        return tl.zeros([], dtype=tl.int64)


@triton.jit
def reach_of(log2_decay, token, REVERSE: tl.constexpr):
    """`l^|i-j|` where j may reach i, else 0: [j, i]."""
    distance = token[None, :] - token[:, None]
    if REVERSE:
        distance = -distance
    reach = tl.exp2(log2_decay * tl.maximum(distance, 0).to(tl.float32))
    return tl.where(distance >= 0, reach, 0.0)


RUNTIME_SIZES = ["tokens", "pieces", "first_piece", "launched", "piece_chunks", "heads"]
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
    words,
    tokens,
    pieces,
    first_piece,
    launched,
    piece_chunks,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    IS_CUT: tl.constexpr,
    STORE_LEAVING: tl.constexpr,
    STORE_CUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 3. Grid: rows x launched pieces x heads x slices, the slices fastest.

    `out` is contiguous. `outer_states`, one a row, enter it in the order of the scan (zero unless
    HAS_OUTER); `cut_states` [rows, pieces - 1] enter pieces, and with STORE_CUT receive what leaves
    them; `leaving_states`, one a row, receive what leaves it if STORE_LEAVING. TRANSPOSED: memory
    holds the transposes of the scan's states.
    """
    row, piece, head, column = share_of(
        tl.program_id(0), first_piece, launched, heads, HEAD_DIM, BLOCK_VALUES
    )
    begin, end = chunks_of(piece, tokens, piece_chunks, BLOCK_TOKENS)
    log2_decay = log2_decay_of(slopes, head)
    a_rows = rows_of(a, a_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
    b_rows = rows_of(b, b_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
    c_rows = rows_of(c, c_strides, row, tokens, head, column, BLOCK_TOKENS, BLOCK_VALUES)
    out_strides = (tl.cast(tokens, tl.int64) * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM)
    out_rows = rows_of(out, out_strides, row, tokens, head, column, BLOCK_TOKENS, BLOCK_VALUES)
    state = tl.zeros([BLOCK_VALUES, HEAD_DIM], dtype=tl.float32)
    cut, is_inside = cut_before(row, piece, pieces, REVERSE)
    if IS_CUT:
        tile = state_tile(cut_states, cut, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED)
        state = tl.load(tile, mask=is_inside, other=0.0)
    if HAS_OUTER:
        tile = state_tile(
            outer_states, row, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED
        )
        state += tl.load(tile, mask=is_inside == 0, other=0.0)
    token = tl.arange(0, BLOCK_TOKENS)
    reach = reach_of(log2_decay, token, REVERSE)
    whole_entering, whole_leaving, whole_carry = chunk_weights(
        log2_decay, BLOCK_TOKENS, tl.zeros([], dtype=tl.int64), BLOCK_TOKENS, REVERSE
    )
    word = word_of(words, end - 1 if REVERSE else begin, PACKED)
    for step in range(end - begin):
        index = end - 1 - step if REVERSE else begin + step
        first = index * BLOCK_TOKENS
        # A chunk ahead, so that nothing waits for it.
        next_word = word_of(words, index - 1 if REVERSE else index + 1, PACKED)
        a_chunk = a_rows.load([first, 0])
        b_chunk = b_rows.load([first, 0])
        c_chunk = tl.trans(c_rows.load([first, 0]))
        count = tl.minimum(tokens - first, BLOCK_TOKENS)
        entering, leaving, carry = whole_entering, whole_leaving, whole_carry
        if (word != 0) | (count < BLOCK_TOKENS):
            entering, leaving, carry = chunk_weights(log2_decay, count, word, BLOCK_TOKENS, REVERSE)
        scores = product(b_chunk, tl.trans(a_chunk), None) * reach
        if word != 0:
            scores = tl.where(in_one_document(word, token, REVERSE), scores, 0.0)
        result = product(state.to(a_chunk.dtype), tl.trans(a_chunk), None) * entering[None, :]
        result = product(c_chunk, scores.to(c_chunk.dtype), result)
        out_rows.store([first, 0], tl.trans(result).to(a_chunk.dtype))
        weighed = (c_chunk.to(tl.float32) * leaving[None, :]).to(c_chunk.dtype)
        state = product(weighed, b_chunk, state * carry)
        word = next_word
    cut, is_inside = cut_before(row, piece - 1 if REVERSE else piece + 1, pieces, REVERSE)
    if STORE_CUT:
        tile = state_tile(cut_states, cut, heads, head, column, HEAD_DIM, BLOCK_VALUES, TRANSPOSED)
        tl.store(tile, state, mask=is_inside)
    if STORE_LEAVING:
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
    words,
    tokens,
    pieces,
    first_piece,
    launched,
    piece_chunks,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    TO_EDGE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Phase 1: the state at each cut were nothing but the row's own state before its piece.

    `states` [rows, pieces - 1, heads, HEAD_DIM, HEAD_DIM] as dv's scan has them, `decays` [rows,
    pieces - 1, heads] what remains of a state that enters the piece. Grid as in `scan_kernel`; the
    last piece in the order of the scan has no cut behind it. TO_EDGE (not packed): only the state
    at the row's end is wanted, which is the last piece's: `pieces` replaces `pieces - 1`, and what
    does not reach that end is not read.
    """
    row, piece, head, column = share_of(
        tl.program_id(0), first_piece, launched, heads, HEAD_DIM, BLOCK_VALUES
    )
    place, is_inside = cut_before(row, piece - 1 if REVERSE else piece + 1, pieces, REVERSE)
    if TO_EDGE:
        place, is_inside = row * pieces + piece, piece < pieces
    if is_inside:
        begin, end = chunks_of(piece, tokens, piece_chunks, BLOCK_TOKENS)
        log2_decay = log2_decay_of(slopes, head)
        b_rows = rows_of(b, b_strides, row, tokens, head, 0, BLOCK_TOKENS, HEAD_DIM)
        c_rows = rows_of(c, c_strides, row, tokens, head, column, BLOCK_TOKENS, BLOCK_VALUES)
        # Tokens whose weight is below the least normal fp32 (2^-126) are not read: fast heads only
        # need a piece's last few chunks.
        visible = tl.minimum(127.0 / tl.maximum(-log2_decay, 1e-6), 1e9).to(tl.int32)
        needed = tl.cdiv(visible, BLOCK_TOKENS) + 1
        if TO_EDGE:
            behind = begin if REVERSE else tl.cdiv(tokens, BLOCK_TOKENS) - end
            needed = tl.maximum(needed - behind, 0)
        needed = tl.minimum(end - begin, needed)
        state = tl.zeros([BLOCK_VALUES, HEAD_DIM], dtype=tl.float32)
        decay = tl.where(needed < end - begin, 0.0, 1.0)
        if HAS_OUTER:
            tile = state_tile(outer_states, row, heads, head, column, HEAD_DIM, BLOCK_VALUES, False)
            _, follows = cut_before(row, piece, pieces, REVERSE)
            state += tl.load(tile, mask=(follows == 0) & (needed == end - begin), other=0.0)
        _, whole_leaving, whole_carry = chunk_weights(
            log2_decay, BLOCK_TOKENS, tl.zeros([], dtype=tl.int64), BLOCK_TOKENS, REVERSE
        )
        word = word_of(words, begin + needed - 1 if REVERSE else end - needed, PACKED)
        for step in range(needed):
            index = begin + needed - 1 - step if REVERSE else end - needed + step
            first = index * BLOCK_TOKENS
            next_word = word_of(words, index - 1 if REVERSE else index + 1, PACKED)
            b_chunk = b_rows.load([first, 0])
            c_chunk = tl.trans(c_rows.load([first, 0]))
            count = tl.minimum(tokens - first, BLOCK_TOKENS)
            leaving, carry = whole_leaving, whole_carry
            if (word != 0) | (count < BLOCK_TOKENS):
                _, leaving, carry = chunk_weights(log2_decay, count, word, BLOCK_TOKENS, REVERSE)
            decay *= carry
            weighed = (c_chunk.to(tl.float32) * leaving[None, :]).to(c_chunk.dtype)
            state = product(weighed, b_chunk, state * carry)
            word = next_word
        tile = state_tile(states, place, heads, head, column, HEAD_DIM, BLOCK_VALUES, False)
        tl.store(tile, state)
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


@triton.jit(do_not_specialize=["first", "end", "tokens", "heads"])
def combine_kernel(
    gathered,
    slopes,
    combined,
    first,
    end,
    tokens,
    heads,
    STATE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """`sum_s l^(tokens (end - 1 - s)) gathered_s` for s from `first` to `end`, in REVERSE
    `l^(tokens (s - first))`. Grid: heads x parts of BLOCK numbers, the parts fastest.

    fp32 is enough: an exponent x is off by some x 2^-22 (roundings of the rate and of products), a
    weight 2^-x by x 2^-x 2^-22 ln 2, which is below 2^-23 for every x, less than exp2 itself is off
    at 1; and the nearest state has x = 0, exact.
    """
    parts: tl.constexpr = STATE_SIZE // BLOCK
    program = tl.program_id(0)
    head = program // parts
    within = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    log2_decay = log2_decay_of(slopes, head)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    for source in range(first, end):
        between = source - first if REVERSE else end - 1 - source
        weight = tl.exp2(log2_decay * (tokens * between).to(tl.float32))
        here = gathered + (tl.cast(source, tl.int64) * heads + head) * STATE_SIZE + within
        state += weight * tl.load(here)
    tl.store(combined + head * STATE_SIZE + within, state)
