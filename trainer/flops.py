"""Floating-point operations that the model must do, and the peak they are held against.

Conventions, for one forward pass (a multiply and an add are two operations; backward counts twice
the forward unless parts are frozen; nothing that is computed again, dropped or padding counts):

- a matrix of n parameters costs 2 n per token; embedding look-ups, norms and activations nothing;
- softmax attention of a document of L tokens: 4 * heads * head_dim * L^2 / 2 (causal: half);
- lightning attention by its recurrence: per token and head, 2 head_dim^2 for `k v^T` added to the
  state and 2 head_dim^2 for `q S`; the decay is not counted;
- an expert's matrices per assignment that was carried out;
- the vision tower by tiles: its matrices per token of a tile, the class token among them, and 4 *
  hidden_size * tokens^2 a block for attention in full; patch embeddings per patch;
- the projector per image token, with those that end rows of patches, which are few;
- a captioner (model.coca) by captions: unimodal layers for their tokens and a class token,
  multimodal ones for their tokens, half of the square in each, cross-attention for every token and
  patch; keys and values of patches per layer that sees. How all embeddings compare with each other
  does not count: 4 embedding_size for each pair of images in a contrast, 0.1 % of VL-01's tower at
  32,768 of them.
- of the backward pass, the gradient of a matrix only where it trains, and that of its input only
  where something trains that this input comes from; each is one forward's worth. An attention
  core's two forwards' worth count where something trains that its queries, keys or values come
  from.

PaLM's convention (arXiv:2204.02311, appendix B) is 6 N + 12 * layers * heads * head_dim * seq_len
per token, attention counted in full; here N is the parameters that one token uses, with the head
and without the embedding, and `layers` counts the softmax layers. It counts no tower.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from fulmen.models.config import ModelConfig, VisionConfig
from fulmen.models.vision import CHANNELS

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets; first match wins.
_PEAKS = [
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),  # behind H200, whose name contains it
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
]


def forward_flops(
    config: ModelConfig,
    *,
    num_tokens: float,
    sum_squared_lengths: float,
    num_assignments: int,
    num_tiles: float = 0,
    num_image_tokens: float = 0,
) -> dict[str, float]:
    """Forward operations by part of the model.

    Args:
        num_tokens: real tokens.
        sum_squared_lengths: sum of the squared document lengths.
        num_assignments: (token, expert) pairs carried out, over all layers.
        num_tiles: tiles of images, which a model with a vision tower sees.
        num_image_tokens: of `num_tokens`, those of images.
    """
    inner = config.num_attention_heads * config.head_dim
    kv_inner = config.num_key_value_heads * config.head_dim
    softmax_layers = config.num_softmax_layers
    lightning_layers = config.num_layers - softmax_layers
    hidden = config.hidden_size
    if config.coca is not None:
        return _captioner_flops(
            config, num_tokens - num_image_tokens, sum_squared_lengths, num_tiles
        )
    seeing = {}
    if config.vision is not None:
        size = config.vision.hidden_size
        seeing = {
            "vision_tower": num_tiles * tile_flops(config.vision),
            "projector": num_image_tokens * 2 * (size * hidden + hidden**2),
        }
    return seeing | {
        "softmax_projections": softmax_layers
        * num_tokens
        * 2
        * hidden
        * (2 * inner + 2 * kv_inner),
        "softmax_core": softmax_layers * 4 * inner * sum_squared_lengths / 2,
        "lightning_projections": lightning_layers * num_tokens * 2 * hidden * 5 * inner,
        "lightning_core": lightning_layers * num_tokens * 4 * inner * config.head_dim,
        "router": config.num_layers * num_tokens * 2 * hidden * config.num_experts,
        "experts": num_assignments * 6 * hidden * config.expert_hidden_size,
        "head": num_tokens * 2 * hidden * config.vocab_size,
    }


def _captioner_flops(
    config: ModelConfig, num_text_tokens: float, sum_squared_lengths: float, num_images: float
) -> dict[str, float]:
    """`forward_flops` of a tower with its captioner; each document is an image and its text."""
    vision, coca = config.vision, config.coca
    assert vision is not None
    assert coca is not None
    size, seen, patches = config.hidden_size, vision.hidden_size, vision.tiling.patches_per_tile
    # (patches + text)^2, summed, less what is not text^2.
    squares = sum_squared_lengths - num_images * patches**2 - 2 * patches * num_text_tokens
    read = num_text_tokens + num_images  # with class tokens
    read_squares = squares + 2 * num_text_tokens + num_images
    block = 2 * (4 * size**2 + 2 * size * config.expert_hidden_size)
    cross = num_text_tokens * (2 * 2 * size**2 + 4 * size * patches)
    cross += num_images * patches * 2 * 2 * seen * size
    pooled = 2 * (2 * patches + 2) * seen**2 + 4 * seen * patches + 2 * seen * coca.embedding_size
    unimodal, layers = coca.num_unimodal_layers, config.num_layers
    return {
        "vision_tower": num_images * tile_flops(vision),
        "pooler": num_images * (pooled + 2 * size * coca.embedding_size),
        "unimodal_layers": unimodal * (read * block + 4 * size * read_squares / 2),
        "multimodal_layers": (layers - unimodal)
        * (num_text_tokens * block + 4 * size * squares / 2 + cross),
        "head": num_text_tokens * 2 * size * config.vocab_size,
    }


def tile_flops(vision: VisionConfig) -> int:
    """Forward operations of the tower for one tile."""
    size, patches = vision.hidden_size, vision.tiling.patches_per_tile
    tokens = patches + 1
    matrices = 2 * tokens * (4 * size**2 + 2 * size * vision.mlp_hidden_size)
    embedding = 2 * patches * CHANNELS * vision.patch_size**2 * size
    return embedding + vision.num_layers * (matrices + 4 * size * tokens**2)


def count_passes_by_part(
    shapes: Iterable[tuple[str, Sequence[int]]], frozen: Collection[str]
) -> dict[str, float]:
    """Forward passes' worth of each part of the model in training, a mean over its layers.

    `shapes` are those of all parameters by name, in the model's order, which is that of the forward
    pass up to parameters that read the same input. All is 3 if nothing is frozen.
    """
    counts: dict[str, list[tuple[int, float]]] = {}  # numbers of a matrix, and its passes
    layers: dict[str, list[tuple[str, int, bool]]] = {}
    # What sees comes first, for its features go through all layers.
    for name, shape in sorted(shapes, key=lambda shape: _order(shape[0])):
        layer = name.split(".")[1] if name.startswith("layers.") else name
        layers.setdefault(layer, []).append((name, prod(shape), name not in frozen))
    below = False  # whether anything trains that the layer's input comes from
    for parameters in layers.values():
        softmax = any(".q_proj." in name for name, _, _ in parameters)
        kind = "softmax" if softmax else "lightning"
        for name, numel, trains in parameters:
            part = _part(name, kind)
            if part:
                reached = below or any(
                    t and _place(n) < _place(name) and ".gate." not in n for n, _, t in parameters
                )
                passes = 1 + reached + trains
                counts.setdefault(part, []).append((numel, passes))
            if name.endswith(_CORE_INPUTS) and not name.startswith(_SEEING):
                core = below or any(t for n, _, t in parameters if n.endswith(_BEFORE_CORE))
                counts.setdefault(f"{kind}_core", []).append((1, 3 if core else 1))
        below = below or any(trains for _, _, trains in parameters)
    return {
        part: sum(numel * passes for numel, passes in found) / sum(numel for numel, _ in found)
        for part, found in counts.items()
    }


_SEEING = ("vision_tower.", "multi_modal_projector.", "image_newline")
_CORE_INPUTS = ("qkv_proj.weight", "q_proj.weight")
_BEFORE_CORE = (
    "input_layernorm.weight",
    "qkv_proj.weight",
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
)


def _order(name: str) -> int:
    """Of what sees by its way through the model, where its parameters' order is another."""
    return next((n for n, begin in enumerate(_SEEING) if name.startswith(begin)), len(_SEEING))


def _part(name: str, kind: str) -> str:
    """The part of `forward_flops` that a matrix belongs to; '' for norms and the embedding."""
    if name.startswith(_SEEING):
        matrix = name.endswith(
            ("_proj.weight", "fc1.weight", "fc2.weight", "patch_embedding.weight")
        )
        if name.startswith("vision_tower."):
            return "vision_tower" if matrix else ""
        return "projector" if name.endswith(".weight") else ""
    if ".experts." in name:
        return "experts"
    if ".gate." in name:
        return "router"
    if name.endswith(("_proj.weight", "output_gate.weight")):
        return f"{kind}_projections"
    return "head" if name.startswith("lm_head.") else ""


def _place(name: str) -> int:
    """Where in a layer a parameter is used: those of one place do not come from each other."""
    if "input_layernorm" in name:
        return 0
    if name.endswith(("out_proj.weight", "o_proj.weight")):
        return 3
    if ".self_attn.norm." in name:
        return 2
    if ".self_attn." in name:
        return 1
    if "post_attention_layernorm" in name:
        return 4
    return 6 if name.endswith("experts.w2") else 5


def training_flops(
    config: ModelConfig,
    *,
    num_tokens: int,
    sum_squared_lengths: float,
    num_assignments: int,
    num_tiles: float = 0,
    num_image_tokens: float = 0,
    passes: Mapping[str, float] | None = None,
) -> float:
    """Operations of forward and backward together: three times the forward.

    Or `passes` times, by part, where some are frozen.
    """
    parts = forward_flops(
        config,
        num_tokens=num_tokens,
        sum_squared_lengths=sum_squared_lengths,
        num_assignments=num_assignments,
        num_tiles=num_tiles,
        num_image_tokens=num_image_tokens,
    )
    return _sum_of_passes(parts, passes)


def _sum_of_passes(parts: Mapping[str, float], passes: Mapping[str, float] | None) -> float:
    return sum((passes or {}).get(part, 3) * flops for part, flops in parts.items())


def palm_training_flops(
    config: ModelConfig,
    *,
    num_tokens: int,
    seq_len: int,
    passes: Mapping[str, float] | None = None,
) -> float:
    """Operations by PaLM's convention; of frozen parts as in `training_flops`."""
    matrices = forward_flops(
        config,
        num_tokens=1,
        sum_squared_lengths=0,
        num_assignments=config.num_layers * config.num_experts_per_token,
    )
    del matrices["lightning_core"]
    inner = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_softmax_layers * inner * seq_len
    return num_tokens * _sum_of_passes(matrices | {"softmax_core": attention}, passes)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the device in `dtype`, or None where it is not known, as of a MIG slice."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name and " MIG " not in name), None)


class Throughput:
    """Speed since the last reading. Evaluation and saving are left out by `restart`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        seq_len: int,
        world_size: int,
        peak: float | None,
        passes: Mapping[str, float] | None = None,
    ) -> None:
        """`peak` is one device's FLOP/s, or None to leave the utilisation out; `passes` as in
        `training_flops`."""
        self._passes = passes
        self._config = config
        self._seq_len = seq_len
        self._world_size = world_size
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._started = time.perf_counter()
        self._steps = self._tokens = self._sum_squared_lengths = 0
        self._tiles = self._image_tokens = 0
        self._dropped: Tensor | int = 0

    def leave_out(self, seconds: float) -> None:
        """Let the interval have begun so much later."""
        self._started += seconds

    def add_step(
        self,
        *,
        num_tokens: int,
        sum_squared_lengths: int,
        num_tiles: int = 0,
        num_image_tokens: int = 0,
        num_dropped: Tensor | int = 0,
    ) -> None:
        """Count one optimiser step, all ranks together; `num_dropped` by whom `dropped` is for."""
        self._steps += 1
        self._tokens += num_tokens
        self._sum_squared_lengths += sum_squared_lengths
        self._tiles += num_tiles
        self._image_tokens += num_image_tokens
        self._dropped = self._dropped + num_dropped

    @property
    def dropped(self) -> Tensor | int:
        """Sum of `num_dropped` over the interval, for `read`: on the device, not waited for."""
        return self._dropped

    def read(self, *, num_dropped: int) -> dict[str, float | None]:
        """The interval's speed; expert work is credited less `num_dropped` assignments, of all
        ranks. Begins a new interval."""
        elapsed = time.perf_counter() - self._started
        asked = self._tokens * self._config.num_experts_per_token * self._config.num_layers
        flops = training_flops(
            self._config,
            num_tokens=self._tokens,
            sum_squared_lengths=self._sum_squared_lengths,
            num_assignments=asked - num_dropped,
            num_tiles=self._tiles,
            num_image_tokens=self._image_tokens,
            passes=self._passes,
        )
        palm = None
        if self._config.coca is None:  # PaLM's convention knows one text model alone
            palm = palm_training_flops(
                self._config, num_tokens=self._tokens, seq_len=self._seq_len, passes=self._passes
            )
        per_device = elapsed * self._world_size
        row = {
            "step_time_s": elapsed / self._steps,
            "tokens_per_s": self._tokens / elapsed,
            "flops_per_token": flops / self._tokens,
            "tflops_per_device": flops / per_device / 1e12,
            "mfu": flops / per_device / self._peak if self._peak else None,
            "mfu_palm": palm / per_device / self._peak if palm and self._peak else None,
        }
        self.restart()
        return row
