"""Sizes of a rank's part of a micro-batch, of which memory and time are counted."""

from dataclasses import dataclass
from math import ceil

from fulmen.parallel.balance import plan_layout
from fulmen.trainer.config import RunConfig

FP32 = 4


def compute_bytes(config: RunConfig) -> int:
    """Of a number in the forward and backward pass."""
    return 2 if config.trainer.dtype == "bfloat16" else FP32


@dataclass(frozen=True)
class Sizes:
    """The letters of the list in trainer/memory.py, for one rank."""

    e: int
    """Bytes of a number of the compute type."""
    T: int
    h: int
    i: int
    v: int
    f: int
    k: int
    E: int
    heads: int
    state: int
    """Numbers of a lightning layer's state."""
    rows: int
    """R."""
    cp: int
    etp: int
    kv_ranks: int
    """Ranks whose keys and values a softmax layer keeps."""
    away: int
    """Of a rank's tokens, a mean, those that softmax layers move to ranks with less to do."""


def sizes_of(config: RunConfig) -> Sizes:
    """With experts that get equal shares; buffers of a capacity, which chunks do without, are
    counted whole."""
    model, parallel = config.model, config.parallel
    tokens = config.trainer.micro_batch_tokens // parallel.cp
    rows = tokens * model.num_experts_per_token
    capacity = config.moe.capacity_factor
    whole = config.trainer.chunk_tokens is None and not config.moe.global_router
    if capacity and whole and parallel.ep * parallel.etp > 1:
        each = min(ceil(capacity * rows / model.num_experts), tokens)
        rows = each * model.num_experts
    return Sizes(
        e=compute_bytes(config),
        T=tokens,
        h=model.hidden_size,
        i=model.num_attention_heads * model.head_dim,
        v=model.num_key_value_heads * model.head_dim,
        f=model.expert_hidden_size,
        k=model.num_experts_per_token,
        E=model.num_experts,
        heads=model.num_attention_heads,
        state=model.num_attention_heads * model.head_dim**2,
        rows=rows * parallel.etp,
        cp=parallel.cp,
        etp=parallel.etp,
        kv_ranks=parallel.cp if parallel.softmax_attention == "gather" else 1,
        away=_count_away(config, tokens),
    )


def _count_away(config: RunConfig, tokens: int) -> int:
    """Of rows whose documents are as long as they may be."""
    cp, length = config.parallel.cp, config.data.seq_len
    if cp == 1:
        return 0
    row = cp * tokens
    bounds = (*range(0, row, min(length, row)), row)
    layout = plan_layout(cp, tokens, bounds, config.parallel.balance_attention)
    away = (
        layout.tokens_of(chunk)
        for rank in range(cp)
        for chunk in layout.owned[rank]
        if layout.home(chunk) != rank
    )
    return ceil(sum(away) / cp)
