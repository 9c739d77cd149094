"""The config.yaml of a run's or a checkpoint's folder, read back."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fulmen.trainer.manifest import CONFIG_FILE, CheckpointError


def load_run_config(path: Path) -> Any:
    """config.yaml of a run's or a checkpoint's folder, as an OmegaConf tree."""
    file = path / CONFIG_FILE
    try:
        tree = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "strerror", None) or f"{error}".partition("\n    full_key")[0]
        raise CheckpointError(f"{file} cannot be read: {reason}") from None
    if not isinstance(tree, DictConfig):
        raise CheckpointError(f"{file} cannot be read: it is a list, no configuration")
    return tree


def values_by_key(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration's values by dotted key; lists are values, empty groups have none."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for key, part in tree.items():
        values |= values_by_key(part, f"{prefix}.{key}" if prefix else str(key))
    return values
