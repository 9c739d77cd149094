"""Keys of launch/preflight.py."""

from dataclasses import dataclass, field


@dataclass
class PreflightConfig:
    """What is looked at before training, and what is good enough."""

    nodes: list[str] = field(default_factory=list)
    """Names of all nodes in the order of their ranks; empty = this machine alone."""
    rank: int | None = None
    """Place of this machine among them; null = SLURM's."""
    address: str | None = None
    """Of the first node, as the others reach it; needed for more than one node."""
    port: int = 29400
    """Where the first node listens."""
    processes: int | None = None
    """Training processes of a node; null = its GPUs, or one without any."""
    gpus: int | None = None
    """GPUs that each node must have; null = as many as it has."""
    folder: str = "."
    """Shared folder that must be writable and quick, such as the run's."""
    cache_folder: str | None = None
    """Folder on each node for compiled kernels; may name variables, $USER."""
    output: str | None = None
    """Folder for preflight.json and bad_nodes; null = print only."""
    meeting_s: float = 180.0
    """Time limit for all nodes to come."""
    exchange_s: float = 180.0
    """Time limit for the measurements of work and exchanges."""
    max_clock_skew_s: float = 2.0
    """Between any node's clock and the median."""
    min_write_mb_per_s: float = 10.0
    """Of one node, while all write to `folder`."""
    min_free_gib: float = 1.0
    """Of `folder`."""
    max_used_gib: float = 2.0
    """Memory of a GPU that something else may hold."""
    min_all_reduce_gb_per_s: float = 0.0
    """Bus bandwidth over all processes."""
    min_all_to_all_gb_per_s: float = 0.0
    """Of each process to the others."""


def check_preflight(config: PreflightConfig) -> None:
    """Raise `ValueError` for keys that make no sense."""
    if len(config.nodes) > 1 and not config.address:
        raise ValueError("address is missing: several nodes need that of the first one")
    if len(set(config.nodes)) < len(config.nodes):
        raise ValueError(f"nodes={config.nodes}: a name is there twice")
    if config.rank is not None and not 0 <= config.rank < max(1, len(config.nodes)):
        raise ValueError(f"rank={config.rank}: must be below the number of nodes")
