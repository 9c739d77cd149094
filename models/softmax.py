"""Softmax attention layer: grouped queries, RoPE on part of each head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.kernels.attention import softmax_attention
from fulmen.kernels.rope import rope
from fulmen.models.config import ModelConfig
from fulmen.models.layers import Context


class SoftmaxAttention(nn.Module):
    """Causal attention with `num_key_value_heads` shared key and value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        kv_inner = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, tokens, hidden_size]` in and out."""
        batch, tokens, _ = x.shape
        shape = (batch, tokens, -1, self.head_dim)
        q = rope(self.q_proj(x).view(shape), context.cos, context.sin)
        k = rope(self.k_proj(x).view(shape), context.cos, context.sin)
        v = self.v_proj(x).view(shape)
        return self.o_proj(self.attend(q, k, v, context).flatten(2))

    # The same in three parts, as in `LightningAttention`.

    @property
    def weights(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Those of `project` and of `close`."""
        project = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        return project, (self.o_proj.weight,)

    def tables(self, context: Context) -> tuple[Tensor, ...]:
        """`[tokens, ...]` each, what `project` needs of its tokens besides their values."""
        return context.cos, context.sin

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[batch, tokens, heads, head_dim]` of `[batch, tokens, hidden_size]`."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rope(F.linear(x, q_weight).view(shape), cos, sin)
        k = rope(F.linear(x, k_weight).view(shape), cos, sin)
        return q, k, F.linear(x, v).view(shape)

    def core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attention, `[batch, tokens, heads, head_dim]`."""
        return self.attend(q, k, v, context)

    def close(self, x: Tensor, output: Tensor, out_weight: Tensor) -> Tensor:
        """The layer's output from its input and the core's output."""
        return F.linear(output.flatten(2), out_weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The attention core on `[batch, tokens, heads, head_dim]`; sequence parallelism's seam."""
        cache = context.cache
        if cache is not None:
            if self.layer in cache.keys:
                k = torch.cat([cache.keys[self.layer], k], dim=1)
                v = torch.cat([cache.values[self.layer], v], dim=1)
            cache.keys[self.layer], cache.values[self.layer] = k, v
        return softmax_attention(
            q,
            k,
            v,
            cu_seqlens=context.cu_seqlens,
            max_seqlen=context.max_seqlen,
            host_cu_seqlens=context.host_cu_seqlens,
        )
