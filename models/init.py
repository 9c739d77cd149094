"""Initial weights: Xavier with DeepNorm's gain, from the seed and the parameter's name alone."""

import hashlib
import math

import torch
from torch import Tensor

from fulmen.models.config import ModelConfig

BLOCK_ELEMENTS = 2**20
"""Elements drawn with one generator; a rank draws only the blocks that its shard touches."""


def init_std(name: str, shape: torch.Size, config: ModelConfig) -> Tensor | float | None:
    """Standard deviation of a parameter's normal values; 0 for biases, None for norms, all ones.

    Xavier: `gain * sqrt(2 / (fan_in + fan_out))` of the single matrix (one head-interleaved part,
    one expert). The paper sets DeepNorm's beta = (8 num_layers)^-0.25 and not where; we follow
    DeepNet: beta on values, output projections and feed-forward weights, 1 elsewhere. For
    `qkv_proj`, whose v rows have another gain than its q and k rows, a `[rows, 1]` tensor.
    """
    if name == "image_newline":
        return shape[0] ** -0.5
    if name.endswith(".bias"):
        return 0.0
    if name.startswith("vision_tower."):
        assert config.vision is not None
        return _prenorm_std(name, shape, config.vision.hidden_size, 2 * config.vision.num_layers)
    if config.coca is not None:
        sums = 3 * config.num_layers - config.coca.num_unimodal_layers
        return _prenorm_std(name, shape, config.hidden_size, sums)
    if len(shape) == 1:
        return None
    beta = (8 * config.num_layers) ** -0.25
    if name.endswith("qkv_proj.weight"):
        std = math.sqrt(2 / (shape[0] // 3 + shape[1]))
        one_head = torch.ones(3, config.head_dim)
        one_head[2] = beta
        return (std * one_head.flatten().repeat(config.num_attention_heads)).unsqueeze(1)
    gained = ("v_proj.weight", "o_proj.weight", "out_proj.weight", ".w1", ".w2", ".w3")
    gain = beta if name.endswith(gained) else 1.0
    return gain * math.sqrt(2 / (shape[-1] + shape[-2]))


def _prenorm_std(name: str, shape: torch.Size, size: int, num_sums: int) -> float | None:
    """Of a weight of the tower or of a captioner, where nothing is published.

    Xavier, and as in CLIP: embeddings of unit length, and outputs of a pre-norm block small enough
    for the sum of all blocks, which add `num_sums` of them.
    """
    if name.endswith(("class_embedding", "position_embedding.weight", "embed_tokens.weight")):
        return size**-0.5
    if name.endswith("pooler.query"):
        return shape[-1] ** -0.5
    if len(shape) == 1:
        return None
    is_output = name.endswith(("out_proj.weight", "fc2.weight"))
    gain = num_sums**-0.5 if is_output else 1.0
    return gain * math.sqrt(2 / (shape[0] + shape[1]))


@torch.no_grad()
def init_rows(
    rows: Tensor,
    name: str,
    shape: torch.Size,
    *,
    config: ModelConfig,
    seed: int,
    first_row: int,
    first_column: int = 0,
) -> None:
    """Fill `rows` with rows `first_row ...` of the initial value of parameter `name`.

    `shape` is the parameter's global shape; a row is a slice along its last dim, counted over all
    leading dims, and `rows` may hold only some columns of each; of a parameter of one dim it is one
    element. The values depend neither on how a parameter is spread over ranks nor on the device.
    """
    if name.endswith("log_scale"):
        assert config.coca is not None
        rows.fill_(-math.log(config.coca.initial_temperature))
        return
    std = init_std(name, shape, config)
    if std is None or (not isinstance(std, Tensor) and std == 0.0):
        rows.fill_(1.0 if std is None else 0.0)
        return
    if len(shape) == 1:
        rows, shape = rows.unsqueeze(1), torch.Size([*shape, 1])
    begin, end = first_row * shape[-1], (first_row + rows.shape[0]) * shape[-1]
    flat = torch.empty(end - begin)
    for block in range(begin // BLOCK_ELEMENTS, -(-end // BLOCK_ELEMENTS)):
        block_begin = block * BLOCK_ELEMENTS
        block_end = min(math.prod(shape), block_begin + BLOCK_ELEMENTS)
        # Always the whole block: fewer numbers from the same generator are not its first ones.
        drawn = torch.randn(block_end - block_begin, generator=_generator(seed, name, block))
        low, high = max(begin, block_begin), min(end, block_end)
        flat[low - begin : high - begin] = drawn[low - block_begin : high - block_begin]
    values = flat.view(-1, shape[-1])[:, first_column : first_column + rows.shape[1]]
    values *= std[first_row : first_row + rows.shape[0]] if isinstance(std, Tensor) else std
    rows.copy_(values)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def init_model(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of an unsharded model."""
    for name, parameter in model.named_parameters():
        rows = parameter.data if parameter.dim() == 1 else parameter.data.flatten(0, -2)
        init_rows(rows, name, parameter.shape, config=config, seed=seed, first_row=0)
