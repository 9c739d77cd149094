"""Which checkpoint and which tokenizer a command means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fulmen.trainer.manifest import read_manifest
from fulmen.trainer.run_config import load_run_config


def find_checkpoint(run: str | None, checkpoint: str | None) -> Path:
    """The folder to load; `ValueError` if none is named, or it is no whole checkpoint."""
    if (run is None) == (checkpoint is None):
        raise ValueError("give either run=RUN_FOLDER or checkpoint=CHECKPOINT_FOLDER")
    if run is not None:
        latest = Path(run) / "checkpoints" / "latest"
        if not latest.exists():
            raise ValueError(f"run={run}: it has no checkpoint ({latest} does not exist)")
        path = latest.resolve()
    else:
        path = Path(checkpoint or "").resolve()
        if not path.is_dir():
            raise ValueError(f"checkpoint={checkpoint}: there is no such folder")
    read_manifest(path)
    return path


def find_sources(checkpoint: Path) -> Mapping[Any, Any]:
    """Sources of the data that a checkpoint was trained on, by name; empty for imported weights."""
    return OmegaConf.select(load_run_config(checkpoint), "data.sources") or {}


def find_tokenizer(tokenizer: str | None, checkpoint: Path) -> Path:
    """The tokenizer file; `ValueError` naming the key if it is not there."""
    if tokenizer is not None:
        path = Path(tokenizer)
        if path.is_dir():  # a prepared folder, as prepare_data takes it
            path /= "tokenizer.json"
    else:
        sources = find_sources(checkpoint)
        if not sources:
            raise ValueError(f"{checkpoint} names no data: give tokenizer=PATH of a tokenizer.json")
        path = Path(next(iter(sources.values())).path) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer {path} does not exist: give tokenizer=PATH of a tokenizer.json, or of a "
            "folder with one"
        )
    return path
