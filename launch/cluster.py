"""Facts of a cluster, which its user keeps in a small YAML file."""

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fulmen.trainer.config import to_dataclass
from fulmen.trainer.preflight_config import PreflightConfig

_OF_JOB = {"nodes", "rank", "address", "port", "processes", "gpus", "folder", "cache_folder"}
_OF_JOB |= {"output"}


@dataclass
class ClusterConfig:
    """The keys of a cluster's file."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int = 8
    """0 = processes on CPUs."""
    gpu: str | None = None
    """Kind for the planner, as in launch/plan.py; null = the planner is left out."""
    gpu_request: str | None = None
    """How the nodes' GPUs are asked for, such as gres=gpu:h100:8; null = gpus-per-node=N."""
    processes_per_node: int | None = None
    """null = one a GPU."""
    cpus_per_node: int | None = None
    memory: str | None = None
    """Of a node, such as 500G, or 0 for all of it; null = the cluster's default."""
    exclusive: bool = True
    """Take whole nodes."""
    interface: str | None = None
    """Network interface between the nodes, such as ib0; null = by the address that SLURM has."""
    cache_folder: str | None = None
    """On each node's own disk, for kernels that Triton and torch.compile make; may name variables
    of the node, as in /tmp/$USER/fulmen."""
    python: str | None = None
    """Interpreter on the nodes; null = the one that submits."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that each node runs first, such as module load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for each node."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, without the dashes: reservation=NAME."""
    preflight: dict[str, Any] = field(default_factory=dict)
    """Limits of PreflightConfig (trainer/preflight.py)."""

    @property
    def processes(self) -> int:
        """Of a node."""
        return self.processes_per_node or self.gpus_per_node or 1


def read_cluster(path: str) -> ClusterConfig:
    """A checked file; `ValueError` naming file and key for what is wrong with it."""
    try:
        given = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ValueError(f"cluster={path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"cluster={path}: no YAML: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"cluster={path}: must be a mapping from keys to values")
    _check_names(f"cluster={path}: ", given, ClusterConfig)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), _escape(given))
        config = to_dataclass(merged, ClusterConfig)
        limits = config.preflight
        _check_names(f"cluster={path}: preflight.", limits, PreflightConfig, but=_OF_JOB)
        OmegaConf.merge(OmegaConf.structured(PreflightConfig), limits)
    except OmegaConfBaseException as error:
        message = f"{error}".strip().partition("\n")[0]
        raise ValueError(f"cluster={path}: {error.full_key}: {message}") from None
    if config.gpus_per_node < 0 or config.processes < 1:
        raise ValueError(
            f"cluster={path}: gpus_per_node and processes_per_node must not be below 0"
        )
    return config


def _escape(value: Any) -> Any:
    """`${NAME}` is the shell's here, not OmegaConf's."""
    if isinstance(value, dict):
        return {key: _escape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escape(entry) for entry in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _check_names(
    where: str, given: dict[str, Any], schema: type, but: Collection[str] = ()
) -> None:
    known = [item.name for item in dataclasses.fields(schema) if item.name not in but]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(known)}"
            raise ValueError(f"{where}{key}: unknown key{hint}")
