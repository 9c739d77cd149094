"""Questions about held-out images: prompts, greedy answers on any mesh, scores, examples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.seeing import seeing_config, write_conversations
from support.worlds import run_world

from fulmen.data.shards import PreparedSplit
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.reading.config import ReadingConfig
from fulmen.trainer.reading.examples import read_examples
from fulmen.trainer.reading.in_loop import Reading, answer_texts


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("conversations"))


def reading_config(images: Path, parallel: ParallelConfig) -> RunConfig:
    config = seeing_config(images)
    config.parallel = parallel
    config.trainer.max_steps = 2
    config.evaluation.reading = ReadingConfig(every_steps=1, max_documents=5, examples=2)
    return config


def read_in_a_run(
    device: torch.device, config: RunConfig, folder: Path
) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Answers before the first step, and what the run logged."""
    folder.mkdir(exist_ok=True, parents=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    reading = trainer.reading
    assert reading is not None
    trainer.model.eval()
    questions = reading.questions["text"]
    answered = answer_texts(reading.reader, questions, reading.tokenizer, reading.mesh)
    trainer.model.train()
    trainer.fit()
    trainer.close()
    return [(q.name, text) for q, text in answered], read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
def test_in_the_loop_on_any_mesh(images: Path, tmp_path: Path) -> None:
    found = []
    for name, size, parallel in [
        ("one", 1, ParallelConfig()),
        ("cp 2, ep 2", 2, ParallelConfig(cp=2, ep=2)),
        ("dp 2, zero 3", 2, ParallelConfig(zero_stage=3)),
        ("cp 2, dp 2, zero 3", 4, ParallelConfig(cp=2, zero_stage=3)),
    ]:
        config = reading_config(images, parallel)
        results = run_world(read_in_a_run, size, config, tmp_path / name)
        assert all(answers == results[0][0] for answers, _ in results)
        found.append(results[0])
    for answers, rows in found:
        assert answers == found[0][0]
        scored = [row for row in rows if "reading/text/anls" in row]
        assert [row["step"] for row in scored] == [1, 2]
        assert all(0 <= row["reading/text/exact_match"] <= 1 for row in scored)
    assert len(found[0][0]) == 5
    assert len({text for _, text in found[0][0]}) > 1
