"""Lightning attention layer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.kernels.gated_norm import gated_rms_norm
from fulmen.kernels.lightning import lightning_attention
from fulmen.kernels.silu_qkv import silu_qkv
from fulmen.models.config import ModelConfig
from fulmen.models.layers import Context, RMSNorm, decay_slopes


class LightningAttention(nn.Module):
    """SiLU on q, k and v, linear attention with decay, RMSNorm over all heads, sigmoid gate."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_layers = config.num_layers
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        inner = self.num_heads * self.head_dim
        # Rows are interleaved by head: [q_0 | k_0 | v_0 | q_1 | ...].
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.norm = RMSNorm(inner, config.lightning_norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, tokens, hidden_size]` in and out."""
        q, k, v = silu_qkv(self.qkv_proj(x), self.num_heads)
        begun = self.begin(k, v, context)
        gate = self.output_gate(x)
        output = self.attend(q, k, v, context, begun).flatten(2)
        return self.out_proj(gated_rms_norm(output, gate, self.norm.weight, self.norm.eps))

    # The same in three parts, for what works on the first and the last by chunks of tokens.

    @property
    def weights(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Those of `project` and of `close`."""
        close = (self.output_gate.weight, self.norm.weight, self.out_proj.weight)
        return (self.qkv_proj.weight,), close

    def tables(self, context: Context) -> tuple[Tensor, ...]:
        """`[tokens, ...]` each, what `project` needs of its tokens besides their values."""
        return ()

    def project(self, x: Tensor, qkv_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[batch, tokens, heads, head_dim]` of `[batch, tokens, hidden_size]`."""
        return silu_qkv(F.linear(x, qkv_weight), self.num_heads)

    def core(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attention, `[batch, tokens, heads, head_dim]`."""
        return self.attend(q, k, v, context, self.begin(k, v, context))

    def close(
        self, x: Tensor, output: Tensor, gate_weight: Tensor, norm: Tensor, out_weight: Tensor
    ) -> Tensor:
        """The layer's output from its input and the core's output."""
        gate = F.linear(x, gate_weight)
        return F.linear(gated_rms_norm(output.flatten(2), gate, norm, self.norm.eps), out_weight)

    def begin(self, k: Tensor, v: Tensor, context: Context) -> Any:
        """What sequence parallelism sends off, so that it is under way beside the gate's product;
        `attend` gets the result."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, begun: Any = None
    ) -> Tensor:
        """The attention core on `[batch, tokens, heads, head_dim]`; sequence parallelism's seam."""
        slopes = decay_slopes(self.num_heads, self.layer, self.num_layers, q.device)
        cache = context.cache
        output, state = lightning_attention(
            q,
            k,
            v,
            slopes,
            cu_seqlens=context.cu_seqlens,
            initial_state=cache.states.get(self.layer) if cache else None,
            output_final_state=cache is not None,
        )
        if cache is not None and state is not None:
            cache.states[self.layer] = state
        return output
