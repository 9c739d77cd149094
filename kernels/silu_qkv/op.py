"""The public op: argument checks, and the choice between Triton and the reference."""

from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.registry import choose
from fulmen.kernels.silu_qkv.reference import reference_silu_qkv


def silu_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of each head's q, k and v, each in a tensor of its own.

    Args:
        qkv: `[batch, tokens, num_heads * 3 * head_dim]`, interleaved by head:
            `[q_0 | k_0 | v_0 | q_1 | ...]`. Copied first unless contiguous.

    Returns:
        q, k, v: `[batch, tokens, num_heads, head_dim]`, contiguous, of the input's dtype; computed
        in fp32 (fp64 for fp64 inputs).
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(
            f"silu_qkv: qkv must be [batch, tokens, {num_heads} heads * 3 * head_dim], "
            f"got {tuple(qkv.shape)}"
        )
    if choose("silu_qkv", ("triton", why_not_triton(qkv)), ("torch", "")) == "triton":
        from fulmen.kernels.silu_qkv.triton_silu_qkv import triton_silu_qkv

        return triton_silu_qkv(qkv, num_heads)
    return reference_silu_qkv(qkv, num_heads)
