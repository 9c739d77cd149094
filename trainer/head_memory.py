"""What the head's cross entropy works with; see trainer/memory.py."""

from math import ceil

FP32 = 4
HEAD_CHUNK_BYTES, HEAD_SLABS, HEAD_TILE, HEAD_ROWS = 544 * 2**20, 8, 8192, 128
HEAD_SUMMED_CHUNKS = 32
"""As in kernels/cross_entropy/triton_cross_entropy.py, which needs Triton to be imported."""


def head_bytes(
    tokens: int, hidden: int, vocab: int, e: int, trained: int, longest: int | None
) -> int:
    """Bytes at the head's peak: gradients of both factors, its input, and what logits take.

    `trained` is the size of its weight, or 0. With `longest`, the most tokens of a document, it
    goes document by document (models/preference.py): in the backward pass it holds the fp32 sum of
    the weight's gradients beside one of them, and a document's own gradients.
    """
    both = 2 * e * tokens * hidden + e * trained
    if longest is None:
        return both + head_scratch(tokens, hidden, vocab, e)
    return both + FP32 * trained + e * longest * hidden + head_scratch(longest, hidden, vocab, e)


def head_scratch(tokens: int, hidden: int, vocab: int, e: int) -> int:
    """Bytes of logits beside the gradients, and of the sum of many visits' gradients."""
    rows = max(HEAD_CHUNK_BYTES // (vocab * e) // HEAD_ROWS * HEAD_ROWS, HEAD_ROWS)
    slab = ceil(ceil(vocab / HEAD_SLABS) / HEAD_TILE) * HEAD_TILE
    inside = min(tokens, hidden) if slab < vocab else 0
    if inside <= rows:
        inside = 0
    visits = (inside > 0) + ceil((tokens - inside) / rows)
    total = FP32 * vocab * hidden if visits > HEAD_SUMMED_CHUNKS else 0
    if not inside:
        return min(tokens, rows) * vocab * e + total
    first = inside * slab * e + FP32 * inside * hidden
    return max(first, min(tokens - inside, rows) * vocab * e) + total
