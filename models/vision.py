"""The vision tower: a CLIP-shaped transformer that makes a row of features of each tile.

Pre-norm blocks with biases, exact GELU, a norm in front of the first block and none behind the
last, names as released (`pre_layrnorm` is spelled so). Tiles never attend to each other, so all of
a micro-batch go through as one batch.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulmen.models.config import VisionConfig

CHANNELS = 3
# Not cuDNN, which torch would choose: it builds a plan for each new number of tiles.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PatchEmbedding(nn.Linear):
    """One linear map of each patch's pixels: the released convolution, whose stride is its size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(CHANNELS * config.patch_size**2, config.hidden_size, bias=False)
        self.patch_size = config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """`[tiles, 3, side, side]` to `[tiles, patches, hidden_size]`, patches row by row."""
        tiles, channels, height, width = pixels.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = pixels.reshape(tiles, channels, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(tiles, rows * columns, self.in_features)
        return super().forward(patches.to(self.weight.dtype))


class VisionEmbeddings(nn.Module):
    """Patches behind one learned class token, with learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.tiling.patches_per_side
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(self.side**2 + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[tiles, 3, side, side]` to `[tiles, 1 + patches, hidden_size]`."""
        size = self.patch_embedding.patch_size
        if pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % size:
            raise ValueError(
                f"tiles of {pixels.shape[3]} x {pixels.shape[2]} pixels: they must be square, and "
                f"their sides multiples of model.vision.patch_size={size}"
            )
        patches = self.patch_embedding(pixels)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.positions(pixels.shape[2] // size)

    def positions(self, side: int) -> Tensor:
        """`[1 + side * side, hidden_size]`, resized bicubically if the tile is of another size."""
        return resize_positions(self.position_embedding.weight, self.side, side)


def resize_positions(weight: Tensor, old: int, new: int) -> Tensor:
    """`[1 + old^2, hidden_size]` to `[1 + new^2, hidden_size]`: bicubic, the class token's kept."""
    if new == old:
        return weight
    matrix = _resizing(old, new).to(weight.device)
    # Matrices rather than `interpolate`, whose backward pass on a GPU adds in any order.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    matrix = matrix.to(wide.dtype)
    grid = wide[1:].unflatten(0, (old, old))
    resized = torch.einsum("yi,ijh,xj->yxh", matrix, grid, matrix).flatten(0, 1)
    return torch.cat([wide[:1], resized]).to(weight.dtype)


@lru_cache(maxsize=8)
def _resizing(old: int, new: int) -> Tensor:
    """`[new, old]` fp64: bicubic interpolation of `old` values in a line to `new`."""
    with torch.inference_mode(False):
        lines = torch.eye(old, dtype=torch.float64, device="cpu")[None, :, :, None]
        return F.interpolate(lines, size=(new, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


class VisionAttention(nn.Module):
    """Attention of every token of a tile to every other, within the tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.q_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """`[tiles, tokens, hidden_size]` in and out."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if x.shape[0] == 0:
            # A batch that kernels refuse; still all weights are to have a gradient, of zero.
            return self.out_proj((q + k + v).transpose(1, 2).flatten(2))
        with sdpa_kernel(KERNELS) if x.is_cuda else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` in and out."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[tiles, tokens, hidden_size]` in and out."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`[tiles, tokens, hidden_size]` in and out."""
        for block in self.layers:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """The transformer with its class token, whose features come first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """`[tiles, 3, side, side]` to `[tiles, 1 + patches, hidden_size]`."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))


class VisionTower(nn.Module):
    """Features of the patches of tiles. Built without initial values; see `models.init`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, to be checkpointed and sharded one by one."""
        return self.vision_model.encoder.layers

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised `[tiles, 3, side, side]` to `[tiles, patches, hidden_size]`.

        The last block's output as it is, without the class token. No tiles are a batch too.
        """
        return self.vision_model(pixels)[:, 1:]
