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

from dataclasses import dataclass
from math import ceil

from fulmen.models.config import ModelConfig, VisionConfig
from fulmen.models.vision import CHANNELS
from fulmen.trainer.config import RunConfig
from fulmen.trainer.sizes import compute_bytes

FP32, INT64 = 4, 8


def documents_in(config: ModelConfig, tokens: int, seq_len: int) -> dict[str, float]:
    """What so many tokens hold, as arguments of `forward_flops`.

    One document fills each row, all of it images where the model sees; or captioned images do.
    """
    if config.vision is None:
        return {"sum_squared_lengths": tokens * seq_len}
    per_tile = config.vision.tiling.patches_per_tile
    if config.coca is not None:
        pairs = count_pairs(config, tokens)
        squares = tokens * tokens / pairs
        found = {"num_tiles": pairs, "num_image_tokens": pairs * per_tile}
        return found | {"sum_squared_lengths": squares}
    return {
        "sum_squared_lengths": tokens * seq_len,
        "num_tiles": tokens / per_tile,
        "num_image_tokens": tokens,
    }


def count_pairs(config: ModelConfig, tokens: int) -> float:
    """Captioned images in so many tokens: captions are taken to be half as long as the longest."""
    assert config.vision is not None
    assert config.coca is not None
    return tokens / (config.vision.tiling.patches_per_tile + config.coca.max_text_tokens / 2)


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


def tower_activations(
    config: ModelConfig, tokens: int, e: int, policy: str, *, trains: bool = True
) -> int:
    """Bytes that tower and projector keep on a rank with so many tokens; 0 without a tower.

    One of which nothing `trains` keeps nothing.
    """
    vision = config.vision
    if vision is None:
        return 0
    projector = tokens * (e * (vision.hidden_size + 3 * config.hidden_size) + 2 * INT64 + 1)
    if not trains:
        return projector
    return tile_activations(vision, count_tiles(vision, tokens), e, policy) + projector


def tile_activations(vision: VisionConfig, tiles: int, e: int, policy: str) -> int:
    """Bytes that the tower keeps for so many tiles."""
    n = tiles * (vision.tiling.patches_per_tile + 1)
    pixels = tiles * vision.tiling.patches_per_tile * CHANNELS * vision.patch_size**2
    return (
        vision.num_layers * block_activations(vision, tiles, e, policy)
        + (e + FP32) * pixels
        + e * n * vision.hidden_size
        + 2 * FP32 * n
    )


def tower_inputs(vision: VisionConfig, tiles: int, e: int) -> int:
    """Bytes of the inputs of all blocks: what full checkpointing keeps, here or on the host."""
    return vision.num_layers * block_activations(vision, tiles, e, "full")


def captioner_inputs(config: ModelConfig, tokens: int, e: int) -> int:
    """The same of a tower and its captioner in a micro-batch of so many tokens."""
    assert config.vision is not None
    assert config.coca is not None
    pairs, captions = ceil(count_pairs(config, tokens)), config.coca.max_text_tokens
    rows = config.num_layers * captions + config.coca.num_unimodal_layers  # with class tokens
    return tower_inputs(config.vision, pairs, e) + e * pairs * rows * config.hidden_size


def tower_work(config: ModelConfig, tokens: int, e: int, *, trains: bool = True) -> int:
    """Bytes in the backward pass of the projector, or of a block that is computed again."""
    vision = config.vision
    assert vision is not None
    of_projector = 4 * e * tokens * config.hidden_size
    if not trains:
        return of_projector
    tiles = count_tiles(vision, tokens)
    n = tiles * (vision.tiling.patches_per_tile + 1)
    gradients = e * n * (3 * vision.hidden_size + 2 * vision.mlp_hidden_size)
    return max(of_projector, gradients) + block_activations(vision, tiles, e, "none")


@dataclass(frozen=True)
class Moved:
    """Numbers that ops bound by memory read and write."""

    forward: float
    again: float
    """In a second pass, by which checkpointing comes to what the backward pass reads."""
    backward: float


def block_moved(n: float, d: int, m: int) -> Moved:
    """Of a pre-norm block with biases, of n tokens of d numbers and an MLP of m, each input read
    once and each output written once.

    A norm 2 d + 3 d, a residual sum 3 d each way, GELU 2 m + 3 m; backward also the sum of q's, k's
    and v's gradients 6 d, and sums of gradients for biases 5 d + m. A second pass ends before the
    last product, so it does without the last residual sum.
    """
    return Moved(n * (10 * d + 2 * m), n * (7 * d + 2 * m), n * (23 * d + 4 * m))


def tower_moved(config: RunConfig, tiles: float, *, trains: bool) -> float:
    """Bytes of such ops in a micro-batch of so many tiles, without backward pass if nothing
    `trains`.

    Outside of the blocks: class token, positions and the first norm 6 d, backward 8 d; pixels come
    in fp32 and are copied once more to lie patch by patch.
    """
    vision, e = config.model.vision, compute_bytes(config)
    assert vision is not None
    patches, d = vision.tiling.patches_per_tile, vision.hidden_size
    n = tiles * (patches + 1)
    block = block_moved(n, d, vision.mlp_hidden_size)
    pixels = tiles * patches * CHANNELS * vision.patch_size**2 * (3 * FP32 + e)
    numbers = block.forward + trains * block.backward
    if trains and config.trainer.activation_checkpointing != "none":
        numbers += block.again
    return pixels + e * (vision.num_layers * numbers + n * d * (6 + 8 * trains))


def last_products(vision: VisionConfig, tiles: float) -> float:
    """Operations that full checkpointing does not repeat: of each block's last product, whose
    output nothing reads again."""
    n = tiles * (vision.tiling.patches_per_tile + 1)
    return vision.num_layers * 2 * n * vision.hidden_size * vision.mlp_hidden_size
