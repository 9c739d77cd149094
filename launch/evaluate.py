"""What a checkpoint makes of long texts: `python launch/evaluate.py run=FOLDER [key=value ...]`.

Over several processes: `torchrun --nproc-per-node 4 launch/evaluate.py run=... parallel.cp=4`.
Keys and their defaults: recipes/evaluate.yaml. Tasks: docs/evaluation.md.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fulmen.launch.checkpoints import find_checkpoint, find_tokenizer
from fulmen.launch.hydra_main import run_hydra
from fulmen.parallel.config import ParallelConfig, check_parallel
from fulmen.trainer.long_context.config import check_tasks

POSITION_LOSS = "position_loss"
DTYPES = ("float32", "bfloat16")


@dataclass
class EvaluateConfig:
    """What to evaluate and how."""

    run: str | None = None
    """Run folder: its newest checkpoint is used, and results go to its `evaluation/step_N/`."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    output: str | None = None
    """Folder of results.json and pictures; null = the run's, needed with `checkpoint`."""
    tokenizer: str | None = None
    """tokenizer.json; null = the one of the run's first source."""
    tasks: list[str] = field(default_factory=list)
    """niah, multi_key, many_keys, multi_value, tracking, passage, common_words, position_loss."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of a text with its question and answer."""
    depths: int = 5
    """Places of the fact, evenly from the start of a text to its end."""
    samples: int = 4
    """Texts of each length and depth, and documents of each source for position_loss."""
    seed: int = 0
    """Of the texts."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    chunk_tokens: int = 32_768
    """Tokens of a text that are read at a time."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Of several processes: cp ranks read a text together, the others share out the texts."""


def evaluate(config: EvaluateConfig) -> None:
    """Check, load, evaluate row by row, print and draw."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check(config, world_size)
    tokenizer = find_tokenizer(config.tokenizer, checkpoint)
    output = find_output(config, checkpoint)

    # torch takes seconds to import; a mistake in the configuration is told before that.
    import torch
    import torch.distributed as dist

    from fulmen.parallel.mesh import build_mesh
    from fulmen.parallel.rendezvous import join_world
    from fulmen.trainer.load import load_model, load_spread_model
    from fulmen.trainer.long_context.evaluation import Settings, evaluate_checkpoint
    from fulmen.trainer.manifest import verify
    from fulmen.trainer.prefill import Reader

    settings = Settings(
        tasks=[task for task in config.tasks if task != POSITION_LOSS],
        position_loss=POSITION_LOSS in config.tasks,
        lengths=sorted(set(config.lengths)),
        depths=config.depths,
        samples=config.samples,
        seed=config.seed,
    )
    dtype, mesh = getattr(torch, config.dtype), None
    try:
        if world_size == 1:
            verify(checkpoint)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model = load_model(checkpoint, dtype=dtype, device=device)
        else:
            device = join_world(asdict(config), timeout_s=config.parallel.timeout_s)
            mesh = build_mesh(config.parallel, device)
            model = load_spread_model(checkpoint, dtype=dtype, mesh=mesh, parallel=config.parallel)
        reader = Reader(model, chunk_tokens=config.chunk_tokens, mesh=mesh)
        evaluate_checkpoint(reader, checkpoint, tokenizer, output, settings, mesh)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check(config: EvaluateConfig, world_size: int) -> None:
    """Raise `ValueError`, naming the key, for what can be told to fail before anything runs."""
    retrieval = [task for task in config.tasks if task != POSITION_LOSS]
    if retrieval or not config.tasks:
        check_tasks(retrieval, config.lengths, config.depths, config.samples, "")
    if not config.lengths:
        raise ValueError("lengths is empty: give at least one number of tokens")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype}: must be one of {', '.join(DTYPES)}")
    if config.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={config.chunk_tokens}: must be at least 1")
    check_parallel(config.parallel, world_size)


def find_output(config: EvaluateConfig, checkpoint: Path) -> Path:
    """Where results go; `ValueError` if that is not said."""
    if config.output is not None:
        return Path(config.output)
    if config.run is None:
        raise ValueError("give output=FOLDER for the results of a checkpoint outside a run")
    return Path(config.run) / "evaluation" / checkpoint.name


def main() -> None:
    """Entry point."""
    run_hydra(evaluate, "evaluate", EvaluateConfig)


if __name__ == "__main__":
    main()
