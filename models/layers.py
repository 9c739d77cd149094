"""Small pieces shared by the blocks: RMSNorm, RoPE, and what a forward pass carries along."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fulmen.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, with a weight; the mean square is fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass
class Cache:
    """What decoding keeps per layer: a recurrent state, or keys and values."""

    num_tokens: int = 0
    """Tokens seen so far."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Lightning layer -> `[batch, heads, head_dim, head_dim]`."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Softmax layer -> `[batch, tokens, kv_heads, head_dim]`, after RoPE."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Softmax layer -> `[batch, tokens, kv_heads, head_dim]`."""


@dataclass(frozen=True)
class Context:
    """What every attention layer of one forward pass needs besides its input."""

    cos: Tensor
    """`[tokens, rotary_dim / 2]` fp32."""
    sin: Tensor
    """`[tokens, rotary_dim / 2]` fp32."""
    cu_seqlens: Tensor | None
    """`[documents + 1]` int32 boundaries of a packed row on the device, or None."""
    host_cu_seqlens: Tensor | None
    """The same in host memory where the caller gave the lengths."""
    max_seqlen: int | None
    """At least the longest document's length, where the caller gave the lengths."""
    cache: Cache | None
    """Set when decoding."""
    row_part: Any = None
    """Where the tokens lie in a row that is spread over ranks; for what replaces `attend`."""


def packed_positions(tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """`[tokens]` position of each token in its document, from 0."""
    index = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return index
    bounds = cu_seqlens.to(device, torch.long)
    return index - bounds[torch.searchsorted(bounds, index, right=True) - 1]


def rope_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * theta^(-2i / rotary_dim)`: `[tokens, rotary_dim / 2]` fp32."""
    index = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / theta ** (index / rotary_dim)
    angle = positions.to(torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


@lru_cache(maxsize=1024)
def decay_slopes(num_heads: int, layer: int, num_layers: int, device: torch.device) -> Tensor:
    """`[num_heads]` fp32 slopes of lightning layer `layer`; the decay per token is `exp(-slope)`.

    ALiBi's `2^(-8 (h + 1) / num_heads)` times `1 - layer / (num_layers - 1) + 1e-5`, the layer
    index counting softmax layers too (the released modeling code). A constant, not a buffer:
    a buffer would follow `.to(bfloat16)` and lose the slow decays.
    """
    factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    slopes = [2.0 ** (-8 * (head + 1) / num_heads) * factor for head in range(num_heads)]
    # Kept beyond this call: what inference mode makes could not be used in training any more.
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)
