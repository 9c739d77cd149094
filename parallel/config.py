"""The `parallel` group of the configuration."""

from dataclasses import dataclass

LIGHTNING_ATTENTION = ("lasp_plus", "lasp")


@dataclass
class ParallelConfig:
    """How the work is spread; data parallelism takes what the other axes leave of the world."""

    cp: int = 1
    """Ranks that share one row of tokens, each a contiguous part of it."""
    ep: int = 1
    """Ranks that share the experts of a layer (only 1 for now)."""
    etp: int = 1
    """Ranks that split each expert's weights (only 1 for now)."""
    lightning_attention: str = "lasp_plus"
    """Between parallel.cp ranks, lightning layers' states are gathered (lasp_plus) or handed from
    rank to rank (lasp)."""
    zero_stage: int = 1
    """ZeRO stage of the dense parameters: 0 none, 1 optimiser, 2 + gradients, 3 + parameters."""
    expert_zero_stage: int | None = None
    """ZeRO stage of the expert parameters; null = as zero_stage."""
    softmax_attention: str = "gather"
    """Softmax layers with cp > 1: ring (keys travel) or gather (every rank gets all keys)."""
    balance_attention: bool = True
    """Even out softmax attention over cp ranks where long documents make it uneven."""
    timeout_s: float = 600.0
    """Time limit of a collective; what the ranks wait for is logged at 0.8 of it."""
    rendezvous_timeout_s: float = 300.0
    """Time limit for all ranks to come at the start."""


def check_parallel(config: ParallelConfig, world_size: int) -> None:
    """Raise `ValueError` naming the keys if `world_size` processes cannot form this mesh."""
    for name in ("ep", "etp"):
        value = getattr(config, name)
        if value != 1:
            raise ValueError(f"parallel.{name}={value}: only 1 is supported so far")
    if config.cp < 1 or world_size % config.cp:
        raise ValueError(
            f"parallel.cp={config.cp} does not divide the {world_size} process(es): change one of "
            "the two"
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
