"""MiniMax-VL-01: the text model, whose image tokens show what the vision tower sees.

An image is a thumbnail and a grid of tiles (`models/image_layout.py`). Each of its tokens takes the
features of one patch through the projector, or is the newline that ends a row of patches. So a
token needs to know one number, its patch among those of all tiles, and everything behind the tower
is done token by token, in any part of a row and on any rank: patches that are padding alone are
never projected, and of a patch only the tower's narrow features ever have to travel.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulmen.models.coca import CoCa
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.image_layout import NEWLINE
from fulmen.models.layers import Cache
from fulmen.models.text import TextModel
from fulmen.models.vision import VisionTower


@dataclass(frozen=True)
class Images:
    """The images of one micro-batch, as the model takes them."""

    pixels: Tensor
    """`[tiles, 3, side, side]` normalised tiles of all images, each one's thumbnail first."""
    places: Tensor
    """`[image_tokens]` int64: where the image tokens lie in the flattened `input_ids`."""
    sources: Tensor
    """`[image_tokens]` int64: the patch that each shows, or `NEWLINE`; see `token_sources`.

    Patches are counted as `collect` gives them: all of `pixels`, or those that came by `route`."""
    route: Any = None
    """Handed on to `collect`, where a row is spread over ranks; see parallel/patches.py."""


class Projector(nn.Module):
    """Two linear maps from the tower's width to the text model's, an exact GELU between them."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., vision_size]` to `[..., hidden_size]`."""
        return self.linear_2(F.gelu(self.linear_1(features)))


class VisionLanguageModel(TextModel):
    """The text model with eyes; without images it computes what the text model does.

    A text model's parameters have the same names and the same initial values in it.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(config, moe)
        assert config.vision is not None
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.hidden_size)
        self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def embed(self, input_ids: Tensor, images: Any = None, cache: Cache | None = None) -> Tensor:
        """The tokens' embeddings `[batch, tokens, hidden_size]`, image tokens' replaced.

        `images` are `Images`; None where there are none. Of a text in several passes the first one
        brings the tiles of all its images, and a `cache` keeps what the tower makes of them.
        """
        embeddings = self.embed_tokens(input_ids)
        if images is None:
            return embeddings
        patches = None if cache is None else cache.patches
        if patches is None:
            patches = self.collect(self.vision_tower(images.pixels).flatten(0, 1), images)
            if cache is not None:
                cache.patches = patches
        features = self.image_features(patches, images.sources)
        flat = embeddings.flatten(0, 1).index_copy(0, images.places, features.to(embeddings.dtype))
        return flat.view_as(embeddings)

    def collect(self, patches: Tensor, images: Images) -> Tensor:
        """`[patches, vision_size]` of this rank's tiles; a seam of sequence parallelism.

        Where a row is spread over ranks, so are its tiles, but not in the same way: gives the
        features of all patches that `images.sources` count, in their order.
        """
        return patches

    def image_features(self, patches: Tensor, sources: Tensor) -> Tensor:
        """`[image_tokens, hidden_size]` of `[patches, vision_size]` and of `sources`."""
        is_newline = (sources == NEWLINE)[:, None]
        if patches.shape[0] == 0:  # a row for the newlines to take; all weights keep a gradient
            patches = patches.new_zeros(1, patches.shape[1]) + patches.sum(0)
        # A patch is shown once at most; newlines take the first one's features, and leave them.
        shown = patches.index_select(0, sources.clamp(min=0))
        return torch.where(is_newline, self.image_newline, self.multi_modal_projector(shown))


def build_model(config: ModelConfig, moe: MoEConfig) -> TextModel | CoCa:
    """The model that a configuration describes, without values."""
    return build_language_model(config, moe) if config.coca is None else CoCa(config)


def build_language_model(config: ModelConfig, moe: MoEConfig) -> TextModel:
    """The same, for what reads and writes text; `ValueError` for a tower with its captioner."""
    if config.coca is not None:
        raise ValueError(
            "this model is a vision tower that learns from captions (model.coca), no language "
            "model: train on with it, or begin a VL model's stage I from its tower"
        )
    kind = TextModel if config.vision is None else VisionLanguageModel
    return kind(config, moe)
