"""A tiny tower with its captioner, and images with captions for it."""

import torch
from torch import Tensor

from fulmen.models.coca import Captions
from fulmen.models.config import CoCaConfig, ModelConfig, VisionConfig

VIT_DATA = [
    *(f"data.sources.{name}.path=none" for name in ("raw_alone", "raw", "refined")),
    "evaluation.zero_shot.imagenet.path=none",
]
"""What the recipes vl01_vit and vl01_vit_336 cannot know, as overrides."""


def tiny_coca(vocab_size: int = 51, image_token_id: int = 1) -> ModelConfig:
    """Widths that differ wherever they may; four patches a tile."""
    return ModelConfig(
        num_layers=3,
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=8,
        rotary_dim=0,
        softmax_every=1,
        num_experts=1,
        num_experts_per_token=1,
        expert_hidden_size=40,
        vocab_size=vocab_size,
        vision=VisionConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            mlp_hidden_size=28,
            tile_size=28,
            patch_size=14,
            image_token_id=image_token_id,
        ),
        coca=CoCaConfig(num_unimodal_layers=1, embedding_size=12, max_text_tokens=20),
    )


def pairs(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Captions]:
    """Images and captions of 1 to 9 tokens, whose padding holds tokens and whose labels end."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(count, 3, 28, 28, generator=generator, dtype=dtype)
    lengths = 1 + torch.arange(count) * 4 % 9
    tokens = int(lengths.max()) + 2
    ids = torch.randint(0, 51, (count, tokens), generator=generator)
    labels = torch.randint(0, 51, (count, tokens), generator=generator)
    labels[torch.arange(tokens) >= lengths[:, None]] = -100
    return pixels, Captions(ids, lengths, labels)
