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


class KeyValues:
    """Keys and values of one softmax layer, in buffers that are made once or double."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the tokens to make room for at first; more find room too."""
        self.num_tokens = 0
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[batch, tokens, kv_heads, head_dim]` each; gives those of all tokens, as views."""
        before, self.num_tokens = self.num_tokens, self.num_tokens + k.shape[1]
        if self._buffers is None or self.num_tokens > self._capacity:
            self._capacity = max(self.num_tokens, self._capacity if not before else 2 * before)
            old, self._buffers = self._buffers, (self._room(k), self._room(v))
            for buffer, kept in zip(self._buffers, old or (), strict=False):
                buffer[:, :before] = kept[:, :before]
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, before : self.num_tokens] = new
        return self.views()

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far."""
        assert self._buffers is not None
        k, v = self._buffers
        return k[:, : self.num_tokens], v[:, : self.num_tokens]

    def _room(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], self._capacity, *x.shape[2:])


@dataclass
class Cache:
    """What a forward pass leaves to the next one of the same text; no gradients go through it."""

    max_tokens: int = 0
    """Room for keys and values that is made at once; 0 = as they come."""
    num_tokens: int = 0
    """Tokens seen so far."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Lightning layer -> `[batch, heads, head_dim, head_dim]`, fp32 at least."""
    keys_values: dict[int, KeyValues] = field(default_factory=dict)
    """Softmax layer -> what it has seen, keys after RoPE."""
    patches: Tensor | None = None
    """`[patches, vision_size]` that the vision tower made of the text's images, once."""

    def of_layer(self, layer: int) -> KeyValues:
        """Keys and values of a softmax layer, which has none before its first tokens."""
        return self.keys_values.setdefault(layer, KeyValues(self.max_tokens))


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
    """Set where a text goes through in several passes."""
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
    """cos and sin of `position * theta^(-2i / rotary_dim)`: `[tokens, rotary_dim / 2]` fp32.

    The frequencies are fp32 as in transformers, the angles are not: near four million radians,
    the last positions of a text that long, fp32 counts in steps of a quarter.
    """
    index = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / theta ** (index / rotary_dim)
    angle = positions.to(torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


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
