"""MiniMax-Text-01: embedding, post-norm blocks of attention and experts, untied head."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fulmen.kernels.cross_entropy import summed_cross_entropy, token_cross_entropy
from fulmen.kernels.norm import deepnorm, rms_norm
from fulmen.models.chunks import in_chunks
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.layers import Cache, Context, RMSNorm, packed_positions, rope_tables
from fulmen.models.lightning import LightningAttention
from fulmen.models.moe import MoE, MoEStats
from fulmen.models.preference import document_cross_entropy
from fulmen.models.softmax import SoftmaxAttention


class LossOutput(NamedTuple):
    """Training losses of one micro-batch, and what its routers did."""

    loss_sum: Tensor
    """fp32 scalar: cross entropy in nats, summed over the labels."""
    aux_loss: Tensor
    """fp32 scalar: load-balancing loss, summed over layers, not yet weighted."""
    counts: Tensor
    """`[layers, num_experts]` int64 assignments the routers asked for."""
    num_dropped: Tensor
    """int64 scalar: assignments over capacity, summed over layers."""
    token_losses: Tensor | None = None
    """`[batch, tokens]`: what `loss_sum` sums, without gradients; None where it is by document."""


class Block(nn.Module):
    """One attention and one expert sublayer.

    The residual is the *normalised* input, `x = alpha * norm(x) + beta * f(norm(x))`: DeepNorm's
    post-norm with each norm moved to the start of the next sublayer, as the released code has it.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.alpha, self.beta = config.alpha, config.residual_beta
        attention = SoftmaxAttention if config.is_softmax(layer) else LightningAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config, moe)
        self.chunk_tokens: int | None = None
        """Tokens that go through what lies around attention's core at a time; None = all."""

    def forward(
        self, x: Tensor, context: Context, num_tokens: int | None
    ) -> tuple[Tensor, MoEStats]:
        """`[batch, tokens, hidden_size]` in and out."""
        return self.mix_channels(self.mix_tokens(x, context), num_tokens)

    def mix_tokens(self, x: Tensor, context: Context) -> Tensor:
        """The attention sublayer and the norm behind it; a seam of activation checkpointing."""
        if self.chunk_tokens is not None and x.shape[0] == 1:
            return self._mix_tokens_in_chunks(x, context, self.chunk_tokens)
        h = self.input_layernorm(x)
        return self._add(h, self.self_attn(h, context), self.post_attention_layernorm.weight)

    def mix_channels(self, h: Tensor, num_tokens: int | None) -> tuple[Tensor, MoEStats]:
        """The expert sublayer without its norm; a seam of activation checkpointing."""
        output, stats = self.block_sparse_moe(h, num_tokens)
        return torch.add(self.alpha * h, output, alpha=self.beta), stats

    def _add(self, h: Tensor, attended: Tensor, weight: Tensor) -> Tensor:
        eps = self.post_attention_layernorm.eps
        return deepnorm(h, attended, weight, eps, alpha=self.alpha, beta=self.beta)

    def _mix_tokens_in_chunks(self, x: Tensor, context: Context, size: int) -> Tensor:
        attention, eps = self.self_attn, self.input_layernorm.eps
        first, last = self.input_layernorm.weight, self.post_attention_layernorm.weight
        of_project, of_close = attention.weights

        def before(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            *own, norm = others
            return tuple(part[0] for part in attention.project(rms_norm(x, norm, eps)[None], *own))

        def after(x: Tensor, output: Tensor, norm: Tensor, added: Tensor, *own: Tensor) -> Tensor:
            h = rms_norm(x, norm, eps)[None]
            return self._add(h, attention.close(h, output[None], *own), added)[0]

        rows = x[0]
        tables = attention.tables(context)
        q, k, v = in_chunks(before, size, (rows, *tables), (*of_project, first))
        output = attention.core(q[None], k[None], v[None], context)[0]
        del q, k, v  # what is needed of them backward is kept by the core
        return in_chunks(after, size, (rows, output), (first, last, *of_close))[0][None]


class Head(nn.Linear):
    """The output head: logits, or with labels their cross entropies."""

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        per_token: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Any:
        """`[batch, tokens, hidden_size]` to logits; with labels to the sum of losses, an fp32
        scalar, and the loss of each token, without gradients.

        With `per_token` the latter alone; with the `lengths` of documents, a sum for each.
        """
        if labels is None:
            return super().forward(hidden)
        if per_token:
            losses = token_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten())
            return losses.view(labels.shape)
        if lengths is not None:
            return document_cross_entropy(
                hidden.flatten(0, 1), self.weight, labels.flatten(), lengths
            )
        total, losses = summed_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten())
        return total, losses.view(labels.shape)


class TextModel(nn.Module):
    """The language model. Built without initial values; see `models.init`."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, moe, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        document_lengths: Sequence[int] | None = None,
        num_tokens: int | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        row_part: Any = None,
        images: Any = None,
        num_logits: int | None = None,
        per_token: bool = False,
        per_document: bool = False,
    ) -> Tensor | LossOutput:
        """Logits `[batch, tokens, vocab_size]`, or the losses if `labels` are given.

        Args:
            input_ids: `[batch, tokens]` int64.
            labels: `[batch, tokens]` int64, already shifted: the token that each position is to
                predict, -100 for none.
            cu_seqlens: `[documents + 1]` int32 boundaries of one packed row (batch 1).
            document_lengths: the same as lengths, on the host, where softmax attention can make
                use of them.
            num_tokens: real tokens of a packed row; those behind them are padding.
            cache: carries states and keys from one call to the next; see `trainer/prefill.py`.
            positions: `[tokens]` in their documents, where they do not follow from `cu_seqlens`.
            row_part: handed on to the attention layers; see `parallel/sequence.py`.
            images: handed on to `embed`; see `models/vl.py`.
            num_logits: give logits of so many last positions; None = of all.
            per_token: with labels, give each one's loss, `[batch, tokens]` fp32, and no gradients.
            per_document: with labels and `document_lengths`, `loss_sum` is `[documents]`.
        """
        context = self._context(input_ids, cu_seqlens, document_lengths, cache, positions, row_part)
        hidden, stats = self._hidden(self.embed(input_ids, images, cache), context, num_tokens)
        if labels is None:
            first = 0 if num_logits is None else hidden.shape[1] - num_logits
            return self.lm_head(hidden[:, first:])
        if per_token:
            return self.lm_head(hidden, labels, per_token=True)
        if per_document and document_lengths is None:
            raise ValueError("TextModel: per_document needs document_lengths")
        found = self.lm_head(hidden, labels, lengths=document_lengths if per_document else None)
        loss_sum, token_losses = (found, None) if per_document else found
        return LossOutput(
            loss_sum,
            torch.stack([s.aux_loss for s in stats]).sum(),
            torch.stack([s.counts for s in stats]),
            torch.stack([s.num_dropped for s in stats]).sum(),
            token_losses,
        )

    def embed(self, input_ids: Tensor, images: Any = None, cache: Cache | None = None) -> Tensor:
        """What enters the first block, `[batch, tokens, hidden_size]`; the VL model's seam."""
        assert images is None, "a text model sees no images"
        return self.embed_tokens(input_ids)

    def _context(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        document_lengths: Sequence[int] | None,
        cache: Cache | None,
        positions: Tensor | None,
        row_part: Any,
    ) -> Context:
        tokens = input_ids.shape[1]
        if positions is None:
            positions = packed_positions(tokens, cu_seqlens, input_ids.device)
        if cache is not None:
            positions = positions + cache.num_tokens
        cos, sin = rope_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        on_host, longest = None, None
        if document_lengths is not None:
            on_host = torch.tensor([0, *accumulate(document_lengths)], dtype=torch.int32)
            # Rounded up to a power of two: a compiled graph is made for few values.
            longest = min(tokens, 1 << (max(document_lengths) - 1).bit_length())
        return Context(cos, sin, cu_seqlens, on_host, longest, cache, row_part)

    def _hidden(
        self, x: Tensor, context: Context, num_tokens: int | None
    ) -> tuple[Tensor, list[MoEStats]]:
        tokens = x.shape[1]
        stats = []
        for block in self.layers:
            x, block_stats = block(x, context, num_tokens)
            stats.append(block_stats)
        if context.cache is not None:
            context.cache.num_tokens += tokens
        return self.norm(x), stats


NOT_ACTIVE = ("embed_tokens.", "lm_head.", "vision_tower.", "multi_modal_projector.", "image_")
"""Beginnings of names that `count_active_parameters` leaves out."""


def count_parameters(model: nn.Module) -> int:
    """All parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Parameters that one token passes through, without embedding and head (the paper's count).

    What makes an image's features of its pixels does not count either.
    """
    config: Any = model.config
    total = 0
    for name, parameter in model.named_parameters():
        if name.startswith(NOT_ACTIVE):
            continue
        numel = parameter.numel()
        if ".experts." in name:
            numel = numel * config.num_experts_per_token // config.num_experts
        total += numel
    return total
