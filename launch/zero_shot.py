"""Zero-shot classification by a checkpoint of a tower's own pretraining: see docs/vision.md.

python launch/zero_shot.py run=RUN_FOLDER path=LABELLED_FOLDER 'templates=["a photo of a {}."]'

Over several processes by torchrun; they share out the images.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fulmen.launch.checkpoints import find_checkpoint
from fulmen.launch.hydra_main import run_hydra
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer.config import ZeroShotConfig


@dataclass
class ClassifyConfig:
    """Keys of `zero_shot.py`."""

    run: str | None = None
    """Run folder: its newest checkpoint is used, and results go to its `evaluation/step_N/`."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    path: str | None = None
    """Labelled folder, as for evaluation.zero_shot.NAME.path; null = those of the run."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Texts in which {} is a class's name; their embeddings are averaged."""
    dtype: str = "float32"
    """float32 or bfloat16."""


def classify(config: ClassifyConfig) -> None:
    """Load, classify, print and keep."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={config.dtype}: must be one of float32, bfloat16")
    folders = None
    if config.path is not None:
        folders = {Path(config.path).name: ZeroShotConfig(config.path, config.templates)}

    # torch takes seconds to import; a mistake in the configuration is told before that.
    import torch
    import torch.distributed as dist

    from fulmen.parallel.mesh import build_mesh
    from fulmen.parallel.rendezvous import join_world
    from fulmen.trainer.zero_shot import classify_by_checkpoint

    device = join_world(asdict(config))
    try:
        mesh = build_mesh(ParallelConfig(), device)
        dtype = getattr(torch, config.dtype)
        found = classify_by_checkpoint(checkpoint, folders, dtype=dtype, mesh=mesh)
    finally:
        dist.destroy_process_group()
    if mesh.rank == 0:
        for name, share in found.items():
            print(f"{name}: {share:.2%} right")
        if config.run is not None:
            folder = Path(config.run) / "evaluation" / checkpoint.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "zero_shot.json").write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Entry point."""
    run_hydra(classify, "zero_shot", ClassifyConfig)


if __name__ == "__main__":
    main()
