"""The `parallel` group of the configuration."""

from dataclasses import dataclass

from fulmen.models.config import ModelConfig

LIGHTNING_ATTENTION = ("lasp_plus", "lasp")
POLICIES = ["none", "selective", "full"]
"""Of activation checkpointing: parallel/checkpointing.py."""


@dataclass
class ParallelConfig:
    """How the work is spread; data parallelism takes what the other axes leave of the world."""

    cp: int = 1
    """Ranks that share one row of tokens, each a contiguous part of it."""
    ep: int = 1
    """Ranks that share the experts of a layer, each some of them whole."""
    etp: int = 1
    """Ranks that split each expert's inner width; neighbours in the world."""
    expert_token_groups: int = 1
    """Groups of tokens of which one travels while experts work on another; 1 = no overlap."""
    zero_stage: int = 1
    """ZeRO stage of the dense parameters: 0 none, 1 optimiser, 2 + gradients, 3 + parameters."""
    expert_zero_stage: int | None = None
    """ZeRO stage of the expert parameters; null = as zero_stage."""
    lightning_attention: str = "lasp_plus"
    """Between parallel.cp ranks, lightning layers' states are gathered (lasp_plus) or handed from
    rank to rank (lasp)."""
    softmax_attention: str = "gather"
    """Softmax layers with cp > 1: ring (keys travel) or gather (every rank gets all keys)."""
    balance_attention: bool = True
    """Even out softmax attention over cp ranks where long documents make it uneven."""
    timeout_s: float = 600.0
    """Time limit of a collective; what the ranks wait for is logged at 0.8 of it. A process that is
    in one part of a step for 1.25 of it ends itself."""
    rendezvous_timeout_s: float = 300.0
    """Time limit for all ranks to come at the start."""


def check_parallel(config: ParallelConfig, world_size: int) -> None:
    """Raise `ValueError` naming the keys if `world_size` processes cannot form this mesh."""
    if config.cp < 1 or world_size % config.cp:
        raise ValueError(
            f"parallel.cp={config.cp} does not divide the {world_size} process(es): change one of "
            "the two"
        )
    if config.ep < 1 or config.etp < 1 or world_size % (config.ep * config.etp):
        raise ValueError(
            f"parallel.ep={config.ep} x parallel.etp={config.etp} does not divide the "
            f"{world_size} process(es): change one of the three"
        )
    if config.expert_token_groups < 1:
        raise ValueError(
            f"parallel.expert_token_groups={config.expert_token_groups}: must be at least 1"
        )
    if config.lightning_attention not in LIGHTNING_ATTENTION:
        raise ValueError(
            f"parallel.lightning_attention={config.lightning_attention}: must be one of "
            f"{', '.join(LIGHTNING_ATTENTION)}"
        )
    for name in ("zero_stage", "expert_zero_stage"):
        value = getattr(config, name)
        if value is not None and value not in (0, 1, 2, 3):
            raise ValueError(f"parallel.{name}={value}: must be 0, 1, 2 or 3")
    if config.softmax_attention not in ("ring", "gather"):
        raise ValueError(
            f"parallel.softmax_attention={config.softmax_attention}: must be ring or gather"
        )


def check_experts(config: ParallelConfig, model: ModelConfig, world_size: int) -> None:
    """Raise `ValueError` naming the keys if the ranks cannot share this model's experts.

    See `expert_shard_dim` in parallel/zero.py for those that `ep` and `etp` do not split.
    """
    if model.num_experts % config.ep:
        raise ValueError(
            f"model.num_experts={model.num_experts} is not a multiple of "
            f"parallel.ep={config.ep}: change one of the two"
        )
    if model.expert_hidden_size % config.etp:
        raise ValueError(
            f"model.expert_hidden_size={model.expert_hidden_size} is not a multiple of "
            f"parallel.etp={config.etp}: change one of the two"
        )
    split = config.ep * config.etp
    stage = config.zero_stage if config.expert_zero_stage is None else config.expert_zero_stage
    edp = world_size // split
    widths = {"model.hidden_size": model.hidden_size}
    if config.etp == 1:
        widths["model.expert_hidden_size"] = model.expert_hidden_size
    # Whole experts on a rank have no dim to be split, as long as there are enough of them.
    cut = model.coca is None and (split > 1 or model.num_experts < edp)
    if cut and stage and all(width % edp for width in widths.values()):
        values = " nor ".join(f"{key}={width}" for key, width in widths.items())
        raise ValueError(
            f"{edp} ranks hold the same experts (processes / parallel.ep / parallel.etp) and do "
            f"not divide {values}: change parallel.ep or parallel.etp, or set "
            "parallel.expert_zero_stage=0"
        )
