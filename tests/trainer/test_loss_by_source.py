"""Training loss by source, against a count by hand."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.folders import write_folder
from support.tiny import VOCAB_SIZE, tiny_config
from support.worlds import run_world
from torch import Tensor

from fulmen.data.config import SourceConfig
from fulmen.data.loader import StepBatch
from fulmen.data.packing import PackedBatch
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics

STEPS = 5
VOCABULARIES = {"books": range(1, 101), "rare": range(101, 201), "web": range(201, VOCAB_SIZE)}
"""Of one source each, so that a token says whose it is."""
WEIGHTS = {"books": 1.0, "rare": 0.1, "web": 3.0}

pytestmark = pytest.mark.slow


def configuration(folder: Path) -> RunConfig:
    chance = random.Random(1)
    config = tiny_config("none", max_steps=STEPS)
    config.data.sources = {}
    for name, vocabulary in VOCABULARIES.items():
        documents = [
            chance.choices(vocabulary, k=chance.choice([2, 9, 30, 75]))  # rows are 32 long
            for _ in range(100)
        ]
        path = write_folder(folder / name, documents, documents[:3], vocab_size=VOCAB_SIZE)
        config.data.sources[name] = SourceConfig(str(path), WEIGHTS[name])
    config.evaluation.every_steps = None
    return config


def counted(device: torch.device, config: RunConfig, folder: Path) -> list[dict[str, float]]:
    """What each step's row has to say: a mean over each source's labels, from logits."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    objective: Any = trainer.objective
    usual, read, begin = objective.loss, objective.read_step, objective.begin_step
    rows: list[dict[str, float]] = []
    sums: dict[str, list[float]] = defaultdict(list)

    def loss(batch: PackedBatch) -> Tensor:
        with torch.no_grad():
            logits = trainer.model(
                batch.input_ids, cu_seqlens=batch.cu_seqlens, num_tokens=batch.num_tokens
            )
        losses = F.cross_entropy(logits[0], batch.labels[0], reduction="none")
        for token, label, one in zip(
            batch.input_ids[0].tolist(), batch.labels[0].tolist(), losses.tolist(), strict=True
        ):
            if label != -100:
                name = next(name for name, known in VOCABULARIES.items() if token in known)
                sums[name].append(one)
        return usual(batch)

    def begin_step(batch: StepBatch) -> None:
        sums.clear()
        begin(batch)

    def read_step() -> dict[str, Any]:
        rows.append({f"loss/{name}": sum(of) / len(of) for name, of in sums.items()})
        return read()

    objective.loss, objective.read_step, objective.begin_step = loss, read_step, begin_step
    trainer.fit()
    trainer.close()
    return rows


def train(device: torch.device, config: RunConfig, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    trainer.fit()
    trainer.close()


def by_source(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.startswith("loss/")} for row in rows]


def test_it_is_the_mean_over_a_sources_labels(one_rank: torch.device, tmp_path: Path) -> None:
    config = configuration(tmp_path)
    wanted = counted(one_rank, config, tmp_path / "one")
    got = by_source(tmp_path / "one")
    assert {len(row) for row in wanted} == {2, 3}, "the rare source must be absent from a step"
    assert [row.keys() for row in got] == [dict(sorted(row.items())).keys() for row in wanted]
    for row, other in zip(got, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    # The same where a row is cut in two, and where micro-batches are shared.
    for cp in (1, 2):
        config.parallel = ParallelConfig(zero_stage=1, cp=cp)
        folder = tmp_path / f"cp{cp}"
        run_world(train, 2, config, folder)
        for row, other in zip(by_source(folder), wanted, strict=True):
            assert row == pytest.approx(other, rel=1e-5)


def test_an_only_source_is_not_logged_twice(one_rank: torch.device, tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.data.sources = {"web": config.data.sources["web"]}
    config.trainer.max_steps = 1
    train(one_rank, config, tmp_path / "one")
    assert by_source(tmp_path / "one") == [{}]
