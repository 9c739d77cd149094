"""lm-evaluation-harness on a checkpoint: `python launch/harness.py run=RUN_FOLDER tasks=[mmlu]`.

Needs the package lm_eval (`pip install lm_eval`), and its tasks need their data: most come from a
hub, those of `include_path` from where their YAML says. Keys: recipes/harness.yaml.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulmen.launch.checkpoints import find_checkpoint, find_tokenizer
from fulmen.launch.generate import end_of_document_id
from fulmen.launch.hydra_main import run_hydra


@dataclass
class HarnessConfig:
    """What to evaluate and how."""

    run: str | None = None
    """Run folder: its newest checkpoint is used, and results go to its `evaluation/step_N/`."""
    checkpoint: str | None = None
    """Checkpoint folder, instead of a run."""
    output: str | None = None
    """Folder of harness.json; null = the run's, needed with `checkpoint`."""
    tokenizer: str | None = None
    """tokenizer.json; null = the one of the run's first source."""
    end_id: int | None = None
    """Token that ends a document; null = as the prepared data says."""
    tasks: list[str] = field(default_factory=list)
    """Names of the harness's tasks and groups."""
    include_path: str | None = None
    """Folder with YAML files of further tasks."""
    num_fewshot: int | None = None
    """Examples before each question; null = each task's own number."""
    limit: int | None = None
    """Questions of each task; null = all."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    chunk_tokens: int = 32_768
    """Tokens of a text that are read at a time."""


def evaluate(config: HarnessConfig) -> None:
    """Load, hand over to the harness, print and keep its table."""
    checkpoint = find_checkpoint(config.run, config.checkpoint)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("the harness runs in one process: start with python, without torchrun")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={config.dtype}: must be one of float32, bfloat16")
    if not config.tasks:
        raise ValueError("tasks is empty: name tasks of lm_eval, tasks=[mmlu,gsm8k]")
    if config.output is None and config.run is None:
        raise ValueError("give output=FOLDER for the results of a checkpoint outside a run")
    output = Path(config.output or Path(config.run or "") / "evaluation" / checkpoint.name)
    tokenizer_file = find_tokenizer(config.tokenizer, checkpoint)
    end_id = end_of_document_id(tokenizer_file) if config.end_id is None else config.end_id
    if end_id is None:
        raise ValueError(f"{tokenizer_file} lies in no prepared folder: give end_id=TOKEN")

    import torch

    from fulmen.data.tokenise import load_tokenizer
    from fulmen.trainer.harness import harness_model
    from fulmen.trainer.likelihood import TextScorer
    from fulmen.trainer.load import load_model
    from fulmen.trainer.manifest import verify
    from fulmen.trainer.prefill import Reader

    verify(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(checkpoint, dtype=getattr(torch, config.dtype), device=device)
    reader = Reader(model, chunk_tokens=config.chunk_tokens)
    scorer = TextScorer(reader, load_tokenizer(str(tokenizer_file)), end_id=end_id)
    results, table = ask_harness(harness_model(scorer), config)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"checkpoint": str(checkpoint), "results": results}
    (output / "harness.json").write_text(json.dumps(facts, indent=1, default=str))
    print(table)
    print(f"results: {output / 'harness.json'}")


def ask_harness(model: Any, config: HarnessConfig) -> tuple[dict[str, Any], str]:
    """Results by task and the harness's table of them."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(config.tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=TaskManager(include_path=config.include_path),
    )
    return found["results"], make_table(found)


def main() -> None:
    """Entry point."""
    run_hydra(evaluate, "harness", HarnessConfig)


if __name__ == "__main__":
    main()
