"""Where documents begin and end in a packed row, by token and by chunk, on the device.

Chunks lie at multiples of BLOCK_TOKENS whatever the documents do, so that loads and stores need no
look-up; what a chunk must know of its documents is read while its products run. The row's ends are
open: its first document takes the state that enters the row, its last one gives the state that
leaves it.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def document_of(cu_seqlens, num_sequences, search_steps, token):
    """Last document that begins at or before `token`."""
    low = token * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle) <= token
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low


@triton.jit
def begin_of(cu_seqlens, num_sequences, search_steps, tokens, token):
    """First token of the document of `token`; -1 for the row's first one, which enters it."""
    inside = tl.minimum(token, tokens - 1)  # the last document goes on behind the row
    begin = tl.load(cu_seqlens + document_of(cu_seqlens, num_sequences, search_steps, inside))
    return tl.where(begin == 0, -1, begin)


@triton.jit(do_not_specialize=["num_sequences", "search_steps", "tokens"])
def documents_kernel(
    cu_seqlens,
    edges,
    chunks,
    num_sequences,
    search_steps,
    tokens,
    BLOCK_TOKENS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Writes both tables of a scan; a program a chunk.

    `edges` [chunks * BLOCK_TOKENS]: how far a token reaches in its document, the first token behind
    it, in REVERSE the first of it. `chunks` [chunks, 2]: a chunk's tokens before the first number
    belong to the document that comes in from the left; those from the second on to the document of
    its last token, in REVERSE to the one that comes in from behind (the chunk's end if none does).
    """
    chunk = tl.program_id(0)
    first = chunk * BLOCK_TOKENS
    token = first + tl.arange(0, BLOCK_TOKENS)
    if REVERSE:
        edge = begin_of(cu_seqlens, num_sequences, search_steps, tokens, token)
    else:
        document = document_of(cu_seqlens, num_sequences, search_steps, token)
        edge = tl.load(cu_seqlens + document + 1)
    tl.store(edges + token, edge)
    document = document_of(cu_seqlens, num_sequences, search_steps, first)
    enters = (first == 0) | (tl.load(cu_seqlens + document) < first)
    enter_until = tl.where(enters, tl.load(cu_seqlens + document + 1), first)
    behind = first + BLOCK_TOKENS
    last = behind if REVERSE else behind - 1
    begin = begin_of(cu_seqlens, num_sequences, search_steps, tokens, last)
    tl.store(chunks + 2 * chunk, enter_until)
    tl.store(chunks + 2 * chunk + 1, begin)
