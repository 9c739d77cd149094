"""Causal softmax attention on torch's scaled_dot_product_attention, one call per document."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Causal attention with scale `1 / sqrt(head_dim)`.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k, v: `[batch, keys, kv_heads, head_dim]`, `heads` a multiple of `kv_heads`. With
            `keys > tokens` the queries are the last `tokens` positions (decoding with a cache).
        cu_seqlens: `[documents + 1]` int32 boundaries of a packed row (batch 1, keys = tokens);
            on the CPU, else the host waits for the device.

    Returns:
        `[batch, tokens, heads, head_dim]`, the type of `q`.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"softmax_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads"
        )
    if cu_seqlens is None:
        return _attend(q, k, v)
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError("softmax_attention: cu_seqlens needs batch 1 and as many keys as queries")
    lengths = cu_seqlens.diff().tolist()
    parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([_attend(*part) for part in parts], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens, keys = q.shape[1], k.shape[1]
    mask = None
    if 1 < tokens < keys:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)
    output = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=tokens == keys,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)
