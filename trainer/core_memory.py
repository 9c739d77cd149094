"""Memory of the cores of attention: what they keep, and what softmax attention works with backward.

The letters are those of trainer/memory.py.
"""

from fulmen.trainer.sizes import FP32, Sizes


def core_inputs(s: Sizes, softmax: bool) -> int:
    """Bytes of q, k and v; over ranks of the row's keys, or the state that comes in."""
    if softmax:
        return s.e * s.T * (s.i + 2 * s.v * s.kv_ranks)
    return s.e * s.T * 3 * s.i + (FP32 * s.state if s.cp > 1 else 0)


def core_outputs(s: Sizes, softmax: bool) -> int:
    """Bytes of the output, with softmax the log-sum-exp too.

    Where tokens move to other ranks, the output is kept where it is computed, for the core's own
    backward pass, and where it belongs, for the projection's.
    """
    if softmax:
        return s.e * s.T * s.i * (2 if s.away else 1) + FP32 * s.T * s.heads
    return s.e * s.T * s.i


def softmax_work(s: Sizes) -> int:
    """Bytes of the gradients in softmax attention's backward pass: of the output, q, k and v; and
    that of q in fp32 inside the kernel (FlashAttention 2 also takes k's and v's by query head).

    Over ranks blocks of keys follow one another: the sums of their gradients are fp32, those of q
    and of the rank's own keys and values besides all that are kept, and the rank's own keys and
    values lie in a copy.
    """
    if s.cp == 1:
        return s.e * s.T * (2 * s.i + 2 * s.v) + FP32 * s.T * s.i
    of_a_block = s.e * s.T * (2 * s.i + 2 * s.v) + FP32 * s.T * s.i
    return of_a_block + s.e * s.T * 2 * s.v + FP32 * s.T * (s.i + 2 * s.v * (s.kv_ranks + 1))
