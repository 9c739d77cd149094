"""Documents of a packed row as bits, a word for each chunk.

Chunks lie at multiples of BLOCK_TOKENS whatever the documents do, so that loads and stores need no
look-up. What a chunk must know of its documents is where they begin (scanning in reverse: end), one
bit a token; everything else follows from the word by arithmetic. The row's ends are open: its first
document takes the state that enters the row, its last one gives the state that leaves it.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def lowest_bit(word):
    """Number of the lowest bit that is set, 64 if none is."""
    # A power of two is exact in fp32, and its exponent is the number.
    power = (word & (0 - word)).to(tl.uint64).to(tl.float32)
    number = (power.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(word == 0, 64, number)


@triton.jit
def highest_bit(word):
    """Number of the highest bit that is set, -1 if none is."""
    word = word.to(tl.uint64)
    # With the bit below it cleared, rounding cannot carry into the exponent.
    number = ((word ^ (word & (word >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.where(word == 0, -1, number)


@triton.jit
def in_one_document(word, token, REVERSE: tl.constexpr):
    """Whether j and i share one, for those j that may reach i: [j, i].

    The word is searched once for each j, not i: in the tensor cores' layout a thread has few j and
    many i.
    """
    here = token.to(tl.int64)
    if REVERSE:
        begin = highest_bit(word & ((tl.full([], 1, tl.int64) << here) - 1)) + 1
        return token[None, :] >= begin[:, None]
    else:
        above = word.to(tl.uint64) >> here.to(tl.uint64) >> 1  # the sign bit is a token like others
        behind = lowest_bit(above.to(tl.int64)) + token + 1
        return token[None, :] < behind[:, None]


@triton.jit(do_not_specialize=["num_sequences", "search_steps", "tokens"])
def documents_kernel(
    cu_seqlens,
    words,
    num_sequences,
    search_steps,
    tokens,
    BLOCK_TOKENS: tl.constexpr,
):
    """Writes `words[reverse, 1 + chunk]`, int64, a program each: bit t says that the chunk's token
    t is the first one of a document, in reverse the last one; the row's own ends do not count.
    Entries before the first and behind the last chunk have no bits."""
    entries = (tl.cdiv(tokens, BLOCK_TOKENS) + 3) // 2 * 2
    reverse = tl.program_id(0) // entries
    chunk = tl.program_id(0) % entries - 1
    offset = tl.arange(0, BLOCK_TOKENS)
    bound = chunk * BLOCK_TOKENS + offset + reverse  # which is a document's beginning, or not
    low = bound * 0
    high = low + num_sequences
    for _ in range(search_steps):  # for the last document that begins at or before `bound`
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle) <= bound
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    is_bound = (tl.load(cu_seqlens + low) == bound) & (bound > 0) & (bound < tokens)
    word = tl.sum(is_bound.to(tl.int64) << offset.to(tl.int64), axis=0)
    tl.store(words + tl.program_id(0), word)
