"""What a vision tower and its projector add to a rank's memory and work; see trainer/memory.py.

Rows are taken to be full of images, and a tile to show as many tokens as it has patches; the tower
is counted for that many tiles. With n tokens of all tiles, class tokens among them, P patches, d
the tower's hidden_size, m its mlp_hidden_size, T image tokens and h the model's hidden_size, kept
until the backward pass in numbers of the compute type, unless said:

| what               | none                       | selective                     | full |
|--------------------|----------------------------|-------------------------------|------|
| a block            | n (8 d + 2 m), fp32 n (4 + | n (7 d + m), fp32 n heads     | n d  |
|                    | heads)                     |                               |      |
| patches' pixels    | P 3 patch_size^2, and fp32 pixels until the forward pass ends      |
| first norm         | n d, fp32 2 n                                                      |
| projector          | T (d + 3 h); int64 places and sources 2 T, one byte T              |

A block keeps its input, both norms' outputs and the second one's input, q, k, v, attention's
output, and in- and output of GELU; with `selective` the products' outputs instead.
"""

from math import ceil

from fulmen.models.config import ModelConfig, VisionConfig
from fulmen.models.vision import CHANNELS

FP32, INT64 = 4, 8


def images_in(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Tiles and image tokens in so many tokens, as arguments of `forward_flops`."""
    if config.vision is None:
        return {}
    per_tile = config.vision.tiling.patches_per_tile
    return {"num_tiles": tokens / per_tile, "num_image_tokens": tokens}


def count_tiles(vision: VisionConfig, tokens: int) -> int:
    """Tiles that a rank with so many tokens runs."""
    return ceil(tokens / vision.tiling.patches_per_tile)


def block_activations(vision: VisionConfig, tiles: int, e: int, policy: str) -> int:
    """Bytes that one block of the tower keeps; `e` are those of a number."""
    n = tiles * (vision.tiling.patches_per_tile + 1)
    d, m, heads = vision.hidden_size, vision.mlp_hidden_size, vision.num_attention_heads
    if policy == "full":
        return e * n * d
    if policy == "selective":
        return e * n * (7 * d + m) + FP32 * n * heads
    return e * n * (8 * d + 2 * m) + FP32 * n * (4 + heads)


def tower_activations(config: ModelConfig, tokens: int, e: int, policy: str) -> int:
    """Bytes that tower and projector keep on a rank with so many tokens; 0 without a tower."""
    vision = config.vision
    if vision is None:
        return 0
    tiles, d = count_tiles(vision, tokens), vision.hidden_size
    n = tiles * (vision.tiling.patches_per_tile + 1)
    pixels = tiles * vision.tiling.patches_per_tile * CHANNELS * vision.patch_size**2
    return (
        vision.num_layers * block_activations(vision, tiles, e, policy)
        + (e + FP32) * pixels
        + e * n * d
        + 2 * FP32 * n
        + tokens * (e * (d + 3 * config.hidden_size) + 2 * INT64 + 1)
    )


def tower_work(config: ModelConfig, tokens: int, e: int) -> int:
    """Bytes in the backward pass of the projector, or of a block that is computed again."""
    vision = config.vision
    assert vision is not None
    tiles = count_tiles(vision, tokens)
    n = tiles * (vision.tiling.patches_per_tile + 1)
    gradients = e * n * (3 * vision.hidden_size + 2 * vision.mlp_hidden_size)
    return max(4 * e * tokens * config.hidden_size, gradients) + block_activations(
        vision, tiles, e, "none"
    )
