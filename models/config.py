"""Shapes of a Text-01 or VL-01 model. The dataclasses are also the schema of the Hydra groups."""

from dataclasses import dataclass

from omegaconf import MISSING

from fulmen.models.image_layout import Tiling


@dataclass
class VisionConfig:
    """The `model.vision` group: the tower that sees, and what an image becomes."""

    num_layers: int = MISSING
    """Transformer blocks of the tower."""
    hidden_size: int = MISSING
    """Width of the tower's residual stream."""
    num_attention_heads: int = MISSING
    """Heads; each takes an equal part of hidden_size."""
    mlp_hidden_size: int = MISSING
    """Inner width of a block's MLP."""
    tile_size: int = MISSING
    """Pixels of a tile's side, for which there are position embeddings."""
    patch_size: int = MISSING
    """Pixels of a patch's side; one image token each."""
    image_token_id: int = MISSING
    """Token that stands for each patch and each end of a row."""
    layer_norm_eps: float = 1.0e-5
    """Epsilon of the tower's norms."""
    max_tiles_per_side: int = 6
    """Tiles along one side of an image's grid."""
    max_tiles: int = 18
    """Tiles of an image's grid, without the thumbnail."""

    @property
    def tiling(self) -> Tiling:
        """Tiles and grids, as `image_layout` takes them."""
        return Tiling(self.tile_size, self.patch_size, self.max_tiles_per_side, self.max_tiles)


@dataclass
class CoCaConfig:
    """The `model.coca` group: how a tower learns from captions by itself (models/coca.py)."""

    num_unimodal_layers: int = MISSING
    """Of model.num_layers, the first ones, which see the text alone; the rest see the image too."""
    embedding_size: int = MISSING
    """Of an image and of a text, where the two are compared."""
    max_text_tokens: int = 76
    """Most tokens of a caption, its end included, for which there are position embeddings."""
    caption_weight: float = 2.0
    """Of the captions' cross entropy in the loss."""
    contrastive_weight: float = 1.0
    """Of the contrastive loss."""
    initial_temperature: float = 0.07
    """By which similarities are divided at the start; learned, and never below 0.01."""


@dataclass
class ModelConfig:
    """The `model` group: every fact that decides the parameters and the forward pass."""

    num_layers: int = MISSING
    """Transformer blocks."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    num_attention_heads: int = MISSING
    """Query heads of a softmax layer, and heads of a lightning layer; a power of two."""
    num_key_value_heads: int = MISSING
    """Key and value heads of a softmax layer."""
    head_dim: int = MISSING
    """Size of one head in both kinds of layer."""
    rotary_dim: int = MISSING
    """Leading dims of a head that RoPE rotates, in softmax layers."""
    num_experts: int = MISSING
    """Experts in each layer."""
    num_experts_per_token: int = MISSING
    """Experts that a token is sent to."""
    expert_hidden_size: int = MISSING
    """Inner width of one SwiGLU expert."""
    vocab_size: int = MISSING
    """Rows of the embedding and of the head."""
    rope_theta: float = 10_000.0
    """RoPE base."""
    softmax_every: int = 8
    """Every n-th layer is softmax attention, the others lightning; 1 = all softmax, 0 = none."""
    rms_norm_eps: float = 1.0e-5
    """Epsilon of the norms on the residual stream."""
    lightning_norm_eps: float = 1.0e-6
    """Epsilon of the norm on the output of lightning attention."""
    residual_alpha: float | None = None
    """Weight of the normalised residual; null = (2 num_layers)^0.25 (DeepNorm)."""
    residual_beta: float = 1.0
    """Weight of each sublayer's output at run time."""
    vision: VisionConfig | None = None
    """The vision tower; null = a text model."""
    coca: CoCaConfig | None = None
    """Train the tower with a captioner, which the keys above describe; null = a language model."""

    @property
    def alpha(self) -> float:
        """The residual weight in force."""
        given = self.residual_alpha
        return (2 * self.num_layers) ** 0.25 if given is None else given

    def is_softmax(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, uses softmax attention."""
        return self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0

    @property
    def num_softmax_layers(self) -> int:
        """Blocks with softmax attention."""
        return sum(self.is_softmax(layer) for layer in range(self.num_layers))


@dataclass
class MoEConfig:
    """The `moe` group: how tokens are routed in training."""

    capacity_factor: float | None = None
    """Assignments an expert takes, over the mean per expert; null = dropless."""
    global_router: bool = False
    """Share each expert's capacity between all ranks, by an exchange of counts."""
    aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss, summed over layers."""
    aux_loss_scope: str = "micro_batch"
    """Tokens that it balances over: micro_batch, or global (one micro-batch of every rank)."""


def check_model(config: ModelConfig, moe: MoEConfig) -> None:
    """Raise `ValueError` naming the keys if the shapes cannot make a model."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = [
        ("num_layers", config.num_layers),
        ("hidden_size", config.hidden_size),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("head_dim", config.head_dim),
        ("num_experts", config.num_experts),
        ("num_experts_per_token", config.num_experts_per_token),
        ("expert_hidden_size", config.expert_hidden_size),
        ("vocab_size", config.vocab_size),
    ]
    for name, value in sizes:
        if value < 1:
            raise ValueError(f"model.{name}={value}: must be at least 1")
    for name in ("rope_theta", "rms_norm_eps", "lightning_norm_eps"):
        if getattr(config, name) <= 0:
            raise ValueError(f"model.{name}={getattr(config, name)}: must be above 0")
    if config.coca is not None:
        _check_coca(config, config.coca)
    elif heads & (heads - 1):
        raise ValueError(
            f"model.num_attention_heads={heads}: must be a power of two, because the published "
            "decay of lightning attention is defined for those"
        )
    if heads % kv_heads:
        raise ValueError(
            f"model.num_attention_heads={heads} is not a multiple of "
            f"model.num_key_value_heads={kv_heads}"
        )
    if config.rotary_dim % 2 or not 0 <= config.rotary_dim <= config.head_dim:
        raise ValueError(
            f"model.rotary_dim={config.rotary_dim}: must be even and at most "
            f"model.head_dim={config.head_dim}"
        )
    if config.num_experts_per_token > config.num_experts:
        raise ValueError(
            f"model.num_experts_per_token={config.num_experts_per_token} exceeds "
            f"model.num_experts={config.num_experts}"
        )
    if config.vision is not None:
        _check_vision(config.vision, config.vocab_size)
    if config.softmax_every < 0:
        raise ValueError(f"model.softmax_every={config.softmax_every}: must be 0 or more")
    if moe.capacity_factor is not None and moe.capacity_factor <= 0:
        raise ValueError(f"moe.capacity_factor={moe.capacity_factor}: must be positive, or null")
    if moe.global_router and moe.capacity_factor is None:
        raise ValueError(
            "moe.global_router=true shares a capacity, but moe.capacity_factor is null (dropless): "
            "set it, or moe.global_router=false"
        )
    if moe.aux_loss_scope not in ("micro_batch", "global"):
        raise ValueError(
            f"moe.aux_loss_scope={moe.aux_loss_scope}: must be one of micro_batch, global"
        )


def _check_vision(vision: VisionConfig, vocab_size: int) -> None:
    for name in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "mlp_hidden_size",
        "tile_size",
        "patch_size",
        "max_tiles_per_side",
        "max_tiles",
    ):
        value = getattr(vision, name)
        if value < 1:
            raise ValueError(f"model.vision.{name}={value}: must be at least 1")
    for whole, part in (("hidden_size", "num_attention_heads"), ("tile_size", "patch_size")):
        size, share = getattr(vision, whole), getattr(vision, part)
        if size % share:
            raise ValueError(
                f"model.vision.{whole}={size} is not a multiple of model.vision.{part}={share}"
            )
    if not 0 <= vision.image_token_id < vocab_size:
        raise ValueError(
            f"model.vision.image_token_id={vision.image_token_id}: must be a row of the embedding, "
            f"below model.vocab_size={vocab_size}"
        )


def _check_coca(config: ModelConfig, coca: CoCaConfig) -> None:
    if config.vision is None:
        raise ValueError("model.coca needs model.vision, the tower that it trains")
    plain = {
        "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "rotary_dim": (config.rotary_dim, 0),
        "softmax_every": (config.softmax_every, 1),
        "num_experts": (config.num_experts, 1),
        "num_experts_per_token": (config.num_experts_per_token, 1),
    }
    for name, (value, wanted) in plain.items():
        if value != wanted:
            raise ValueError(
                f"model.{name}={value}: a model with model.coca is a plain transformer, with "
                f"learned positions and without experts: set it to {wanted}"
            )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"model.hidden_size={config.hidden_size} is not a multiple of "
            f"model.num_attention_heads={config.num_attention_heads}"
        )
    if not 1 <= coca.num_unimodal_layers < config.num_layers:
        raise ValueError(
            f"model.coca.num_unimodal_layers={coca.num_unimodal_layers}: must be at least 1, and "
            f"below model.num_layers={config.num_layers}, so that some layers see the image"
        )
    for name, least in (("embedding_size", 1), ("max_text_tokens", 2)):
        if getattr(coca, name) < least:
            raise ValueError(f"model.coca.{name}={getattr(coca, name)}: must be at least {least}")
    for name in ("caption_weight", "contrastive_weight"):
        if getattr(coca, name) < 0:
            raise ValueError(f"model.coca.{name}={getattr(coca, name)}: must not be negative")
    if not coca.initial_temperature >= 0.01:
        raise ValueError(
            f"model.coca.initial_temperature={coca.initial_temperature}: must be at least 0.01"
        )
