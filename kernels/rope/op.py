"""The public op: argument checks, and the choice between Triton and the reference."""

from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.registry import choose
from fulmen.kernels.rope.reference import reference_rope


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` numbers of each head; the rest passes through.

    Number i is paired with number i + rotary_dim / 2 (the NeoX layout).

    Args:
        x: `[batch, tokens, heads, head_dim]`; views whose heads' numbers lie side by side are read
            in place.
        cos, sin: `[tokens, rotary_dim / 2]` of each token's angles, so that packed documents'
            positions are in them; rotary_dim from 0 to head_dim. They receive no gradient.

    Returns:
        Shaped and typed like `x`, contiguous; `x` itself where rotary_dim is 0. The rotation is
        computed in fp32 (fp64 for fp64 inputs).
    """
    if (
        x.dim() != 4
        or cos.shape != sin.shape
        or cos.dim() != 2
        or cos.shape[0] != x.shape[1]
        or 2 * cos.shape[1] > x.shape[3]
    ):
        raise ValueError(
            "rope: x must be [batch, tokens, heads, head_dim] and cos and sin [tokens, rotary_dim "
            f"/ 2], got {tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    if cos.shape[1] == 0:
        return x
    cos, sin = cos.detach(), sin.detach()
    if choose("rope", ("triton", why_not_triton(x)), ("torch", "")) == "triton":
        from fulmen.kernels.rope.triton_rope import triton_rope

        return triton_rope(x, cos, sin)
    return reference_rope(x, cos, sin)
