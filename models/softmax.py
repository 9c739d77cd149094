"""Softmax attention layer: grouped queries, RoPE on part of each head."""

from torch import Tensor, nn

from fulmen.kernels.attention import attend_behind, softmax_attention
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """The attention core on `[batch, tokens, heads, head_dim]`; sequence parallelism's seam."""
        if context.cache is not None:
            k, v = context.cache.of_layer(self.layer).append(k, v)
            if 1 < q.shape[1] < k.shape[1]:
                return attend_behind(q, k, v)
        return softmax_attention(
            q,
            k,
            v,
            cu_seqlens=context.cu_seqlens,
            max_seqlen=context.max_seqlen,
            host_cu_seqlens=context.host_cu_seqlens,
        )
