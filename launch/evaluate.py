"""What a checkpoint makes of long texts, and of images.

`python launch/evaluate.py run=FOLDER tasks=[niah,reading] [key=value ...]`

Over several processes: `torchrun --nproc-per-node 4 launch/evaluate.py run=... parallel.cp=4`.
Keys and their defaults: recipes/evaluate.yaml. Tasks: docs/evaluation.md.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fulmen.launch.checkpoints import find_checkpoint, find_sources, find_tokenizer
from fulmen.launch.hydra_main import run_hydra
from fulmen.parallel.config import ParallelConfig, check_parallel
from fulmen.trainer.long_context.config import TASKS, check_tasks
from fulmen.trainer.reading.config import IMAGE_TASKS, READING

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
    """niah, multi_key, many_keys, multi_value, tracking, passage, common_words, position_loss; of
    images: reading, docvqa, ai2d."""
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
    data: Any = None
    """Files of docvqa or ai2d (.parquet, .jsonl, .tar): one, a glob, a folder or a list of them."""
    sources: list[str] = field(default_factory=list)
    """The run's sources for reading; empty = all that hold out conversations about images."""
    max_documents: int | None = None
    """Documents of each source for reading, and records of a benchmark; null = all."""
    max_answer_tokens: int = 32
    """Longer stored answers are left out; of a benchmark, where an answer is cut."""
    instruction: str | None = None
    """Line behind the questions of a benchmark, "" = none; null = the usual one."""
    examples: int = 8
    """Questions of each row that are kept with their images."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Of several processes: cp ranks read a text together, the others share out the texts."""


def evaluate(config: EvaluateConfig) -> None:
    """Check, load, evaluate row by row, print and draw."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check(config, world_size)
    tokenizer = find_tokenizer(config.tokenizer, checkpoint)
    output = find_output(config, checkpoint)
    if POSITION_LOSS in config.tasks and not find_sources(checkpoint):
        raise ValueError(
            f"tasks={POSITION_LOSS}: {checkpoint} names no data whose held-out documents could be "
            "read (imported weights have none): ask for other tasks"
        )

    # torch takes seconds to import; a mistake in the configuration is told before that.
    import torch
    import torch.distributed as dist

    from fulmen.parallel.mesh import build_mesh
    from fulmen.parallel.rendezvous import join_world
    from fulmen.trainer.load import load_model, load_spread_model
    from fulmen.trainer.long_context.evaluation import Settings, evaluate_checkpoint
    from fulmen.trainer.manifest import verify
    from fulmen.trainer.prefill import Reader
    from fulmen.trainer.reading import evaluation as reading

    settings = Settings(
        tasks=retrieval_tasks(config),
        position_loss=POSITION_LOSS in config.tasks,
        lengths=sorted(set(config.lengths)),
        depths=config.depths,
        samples=config.samples,
        seed=config.seed,
        dtype=config.dtype,
    )
    asked = reading.open_questions(
        checkpoint,
        tokenizer,
        tasks=[task for task in config.tasks if task in IMAGE_TASKS],
        sources=config.sources,
        data=config.data,
        max_documents=config.max_documents,
        max_answer_tokens=config.max_answer_tokens,
        instruction=config.instruction,
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
        if settings.tasks or settings.position_loss:
            evaluate_checkpoint(reader, checkpoint, tokenizer, output, settings, mesh)
        if asked:
            reading.evaluate_reading(
                reader, asked, checkpoint, tokenizer, output, examples=config.examples, mesh=mesh
            )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check(config: EvaluateConfig, world_size: int) -> None:
    """Raise `ValueError`, naming the key, for what can be told to fail before anything runs."""
    retrieval = retrieval_tasks(config)
    known = (*TASKS, POSITION_LOSS, *IMAGE_TASKS)
    if unknown := [task for task in config.tasks if task not in known]:
        raise ValueError(f"tasks={','.join(unknown)}: choose from {', '.join(known)}")
    if retrieval or not config.tasks:
        check_tasks(retrieval, config.lengths, config.depths, config.samples, "")
    if not config.lengths and (retrieval or POSITION_LOSS in config.tasks):
        raise ValueError("lengths is empty: give at least one number of tokens")
    benchmarks = [task for task in config.tasks if task in IMAGE_TASKS and task != READING]
    if len(benchmarks) > 1:
        raise ValueError(f"tasks={','.join(benchmarks)}: data is of one benchmark, so ask for one")
    if benchmarks and not config.data:
        raise ValueError(f"data is empty: give the files of {benchmarks[0]}")
    for key, least in (("max_documents", 1), ("max_answer_tokens", 1), ("examples", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value}: must be at least {least}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype}: must be one of {', '.join(DTYPES)}")
    if config.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={config.chunk_tokens}: must be at least 1")
    check_parallel(config.parallel, world_size)


def retrieval_tasks(config: EvaluateConfig) -> list[str]:
    """What is asked of long texts."""
    return [task for task in config.tasks if task not in (POSITION_LOSS, *IMAGE_TASKS)]


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
