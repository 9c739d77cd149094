"""CoCa (arXiv:2205.01917): a vision tower that learns from captions, by itself.

    pixels -> tower -> patches --- pooler ------------> image's embedding \\
                          |                                                > contrastive loss
                          |    class token at the end -> text's embedding /
                          |        /
    caption -> unimodal layers --+
                          |      multimodal layers -> head -> caption loss
                          +--------^ (cross-attention)

The unimodal layers see the text up to each token, and so the class token behind the last one sees
all of it. The multimodal layers go on from there with the patches. The tower's features are those
that a VL model takes: the last block's output, neither normalised nor with the class token; whoever
reads them here has a norm of his own.

A caption is a row of its own, padded at its end; causal attention never looks there, so nothing is
masked. Its first token is the image token, from which the first word is predicted.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from fulmen.models.config import ModelConfig
from fulmen.models.text import Head
from fulmen.models.vision import KERNELS, VisionTower

LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Captions:
    """The captions of a micro-batch, one a row."""

    input_ids: Tensor
    """`[captions, tokens]` int64, without their ends; anything in the padding."""
    lengths: Tensor
    """`[captions]` int64 tokens without the padding."""
    labels: Tensor | None = None
    """`[captions, tokens]` int64: the token that each position is to predict, -100 for none."""
    count: int | None = None
    """Captions that count, the first ones; None = all. A row that does not lets a rank that has
    none take part in everything."""


class CoCaLosses(NamedTuple):
    """Losses of one micro-batch on one rank."""

    caption_loss_sum: Tensor
    """fp32 scalar: cross entropy in nats, summed over the labels."""
    contrastive_loss_sum: Tensor
    """fp32 scalar: mean of both directions' cross entropy, summed over this rank's images."""
    num_right: Tensor
    """int64 scalar: images whose text is nearest, and texts whose image is."""
    temperature: Tensor
    """fp32 scalar: what similarities are divided by."""


class Attention(nn.Module):
    """Attention to another sequence, or causal attention to the same one."""

    def __init__(self, size: int, source_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(source_size, size)
        self.v_proj = nn.Linear(source_size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """`[batch, tokens, size]` in and out; `source` is `[batch, others, source_size]`."""
        seen = x if source is None else source
        q, k, v = (
            proj(one).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, one in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen))
        )
        with sdpa_kernel(KERNELS) if x.is_cuda else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=source is None)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CaptionBlock(nn.Module):
    """A pre-norm block of causal attention and an MLP; between them, where it sees, the image."""

    def __init__(self, config: ModelConfig, *, sees: bool) -> None:
        super().__init__()
        assert config.vision is not None
        size, heads = config.hidden_size, config.num_attention_heads
        patch_size = config.vision.hidden_size
        self.self_attn = Attention(size, size, heads)
        self.self_attn_norm = layer_norm(size, config)
        self.sees = sees
        if sees:
            self.cross_attn = Attention(size, patch_size, heads)
            self.cross_attn_norm = layer_norm(size, config)
            self.patch_norm = layer_norm(patch_size, config)
        self.fc1 = nn.Linear(size, config.expert_hidden_size)
        self.fc2 = nn.Linear(config.expert_hidden_size, size)
        self.mlp_norm = layer_norm(size, config)

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """`[captions, tokens, hidden_size]` in and out."""
        x = x + self.self_attn(self.self_attn_norm(x))
        if self.sees:
            assert patches is not None
            x = x + self.cross_attn(self.cross_attn_norm(x), self.patch_norm(patches))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


class Pooler(nn.Module):
    """One learned query that attends to the patches of each image, and a map to its embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        assert config.coca is not None
        size = config.vision.hidden_size
        self.query = nn.Parameter(torch.empty(1, size))
        self.norm = layer_norm(size, config)
        self.attn = Attention(size, size, config.vision.num_attention_heads)
        self.post_norm = layer_norm(size, config)
        self.projection = nn.Linear(size, config.coca.embedding_size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """`[images, patches, vision size]` to `[images, embedding_size]`."""
        query = self.query.expand(patches.shape[0], 1, -1)
        pooled = self.attn(query, self.norm(patches))[:, 0]
        return self.projection(self.post_norm(pooled))


class TextHead(nn.Module):
    """From the class token to a text's embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.coca is not None
        self.norm = layer_norm(config.hidden_size, config)
        self.projection = nn.Linear(config.hidden_size, config.coca.embedding_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[texts, hidden_size]` to `[texts, embedding_size]`."""
        return self.projection(self.norm(x))


class Contrast(nn.Module):
    """Each image against all texts and each text against all images, with a learned temperature.

    "All" are those of one micro-batch on every rank, which `gather` brings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(1))

    def forward(self, images: Tensor, texts: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
        """`[pairs, embedding_size]` of unit length each to the last three of `CoCaLosses`.

        Every rank has room for so many pairs.
        """
        count = images.shape[0]
        assert count <= room, f"{count} pairs, but room for {room}"
        rows = torch.cat([images, texts, images.new_ones(count, 1)], dim=1)
        everyone, first = self.gather(F.pad(rows, (0, 0, 0, room - count)))
        all_images, all_texts = everyone[:, :-1].chunk(2, dim=1)
        absent = everyone[:, -1].detach() == 0
        # Beyond the limit there is no gradient: a temperature that has come to its least stays.
        scale = self.log_scale.clamp(max=-math.log(LEAST_TEMPERATURE)).exp().to(images.dtype)
        own = torch.arange(first, first + count, device=images.device)
        loss, right = images.new_zeros(()), own.new_zeros(())
        for mine, others in ((images, all_texts), (texts, all_images)):
            scores = (scale * mine @ others.T).masked_fill(absent, -torch.inf)
            loss = loss + F.cross_entropy(scores, own, reduction="sum") / 2
            right = right + (scores.argmax(1) == own).sum()
        return loss, right, 1 / scale.detach()[0]

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all ranks and the index of this one's first; a seam of data parallelism."""
        return rows, 0


class CoCa(nn.Module):
    """Tower, text decoder and both losses. Built without initial values; see `models.init`.

    The tower's parameters have the names and initial values that they have in a VL model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        assert config.coca is not None
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.coca.max_text_tokens, config.hidden_size)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(
            CaptionBlock(config, sees=layer >= config.coca.num_unimodal_layers)
            for layer in range(config.num_layers)
        )
        self.norm = layer_norm(config.hidden_size, config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.text_head = TextHead(config)
        self.vision_tower = VisionTower(config.vision)
        self.pooler = Pooler(config)
        self.contrast = Contrast()

    def forward(
        self, pixels: Tensor | None, captions: Captions | None = None, *, room: int | None = None
    ) -> CoCaLosses | Tensor:
        """The losses of images `[captions, 3, side, side]` and their captions.

        Of either alone, its embeddings `[..., embedding_size]` of unit length. `room` is the most
        captions that any rank has in a micro-batch, the same on all; None = those that are here.
        """
        if captions is None:
            assert pixels is not None
            return unit(self.pooler(self.vision_tower(pixels)))
        hidden, texts = self._read(captions)
        if pixels is None:
            return texts
        assert captions.labels is not None
        patches = self.vision_tower(pixels)
        count = pixels.shape[0] if captions.count is None else captions.count
        images = unit(self.pooler(patches))
        room = max(count, 1) if room is None else room
        loss, right, temperature = self.contrast(images[:count], texts[:count], room)
        for block in list(self.layers)[self._num_unimodal :]:
            hidden = block(hidden, patches)
        caption_loss, _ = self.lm_head(self.norm(hidden), captions.labels)
        return CoCaLosses(caption_loss, loss, right, temperature)

    @property
    def _num_unimodal(self) -> int:
        assert self.config.coca is not None
        return self.config.coca.num_unimodal_layers

    def _read(self, captions: Captions) -> tuple[Tensor, Tensor]:
        """What leaves the unimodal layers, without class tokens, and the texts' embeddings."""
        ids, lengths = captions.input_ids, captions.lengths
        x = self.embed_tokens(ids) + self.position_embedding.weight[: ids.shape[1]]
        # A place more, for the class token of the longest.
        x = F.pad(x, (0, 0, 0, 1))
        places = torch.arange(x.shape[1], device=ids.device)
        x = torch.where((places == lengths[:, None])[..., None], self.class_embedding, x)
        for block in list(self.layers)[: self._num_unimodal]:
            x = block(x)
        first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=ids.device)
        ends = x.flatten(0, 1).index_select(0, first + lengths)
        # The layers behind may be computed twice, from a copy on the host that needs it dense.
        return x[:, :-1].contiguous(), unit(self.text_head(ends))


def layer_norm(size: int, config: ModelConfig) -> nn.LayerNorm:
    """With the epsilon of the model's norms."""
    return nn.LayerNorm(size, eps=config.rms_norm_eps)


def unit(x: Tensor) -> Tensor:
    """`[..., size]` scaled to length 1, in fp32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
