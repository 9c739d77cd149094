"""Which checkpoint and which tokenizer a command means."""

from pathlib import Path

from omegaconf import OmegaConf


def find_checkpoint(run: str | None, checkpoint: str | None) -> Path:
    """The folder to load; `ValueError` naming the key if there is none."""
    if (run is None) == (checkpoint is None):
        raise ValueError("give either run=RUN_FOLDER or checkpoint=CHECKPOINT_FOLDER")
    if run is not None:
        latest = Path(run) / "checkpoints" / "latest"
        if not latest.exists():
            raise ValueError(f"run={run}: it has no checkpoint ({latest} does not exist)")
        return latest.resolve()
    path = Path(checkpoint or "")
    if not path.is_dir():
        raise ValueError(f"checkpoint={path}: there is no such folder")
    return path.resolve()


def find_tokenizer(tokenizer: str | None, checkpoint: Path) -> Path:
    """The tokenizer file; `ValueError` naming the key if it is not there."""
    if tokenizer is not None:
        path = Path(tokenizer)
    else:
        run = OmegaConf.load(checkpoint / "config.yaml")
        sources = OmegaConf.select(run, "data.sources") or {}
        if not sources:
            raise ValueError(f"{checkpoint} names no data: give tokenizer=PATH of a tokenizer.json")
        path = Path(next(iter(sources.values())).path) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer {path} does not exist: give tokenizer=PATH of a tokenizer.json"
        )
    return path
