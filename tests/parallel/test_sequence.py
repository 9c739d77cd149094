"""Rows spread over ranks: layers alone in fp64, and whole runs, equal one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_config
from support.worlds import run_world
from torch import nn

from fulmen.models.text import TextModel
from fulmen.parallel import sequence
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import spread_rows
from fulmen.parallel.sequence import RowPart
from fulmen.trainer.config import RunConfig
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import EVAL_PREFIX, read_metrics

TOKENS, HEADS, DIM = 48, 2, 16
DOCUMENTS = [
    [48],
    [1, 46, 1],  # one longer than all ranks but one
    [12, 12, 12, 12],  # boundaries on the cut points of four ranks
    [5, 19, 1, 23],
    [30, 0, 18],
    [1] * 48,
]


@st.composite
def part_of_a_row(draw: st.DrawFn) -> RowPart:
    size, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    cuts = draw(st.lists(st.integers(0, size * tokens), max_size=8))
    rank = draw(st.integers(0, size - 1))
    return RowPart(rank, size, tokens, (0, *sorted(cuts), size * tokens))


@pytest.mark.fast
@given(part_of_a_row())
@settings(deadline=None)
def test_a_part_knows_its_documents(part: RowPart) -> None:
    document_of = [sum(bound <= t for bound in part.bounds) for t in range(part.size * part.tokens)]
    mine = document_of[part.first : part.first + part.tokens]
    assert part.lengths == [mine.count(document) for document in sorted(set(mine))]

    def reaches(sender: int, receiver: int) -> bool:
        last, first = (sender + 1) * part.tokens - 1, receiver * part.tokens
        return document_of[last] == document_of[first]

    for other in range(part.size):
        if other < part.rank:
            assert (other >= part.first_sender) == reaches(other, part.rank)
        if other > part.rank:
            assert (other <= part.last_receiver) == reaches(part.rank, other)
    for token in range(1, len(document_of) + 1):
        assert part.document_before(token) == document_of.index(document_of[token - 1])


def losses_of(
    device: torch.device, config: RunConfig, run_dir: Path
) -> list[tuple[float, float, float]]:
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), run_dir)
    try:
        trainer.fit()
    finally:
        trainer.close()
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(r["loss"], r["grad_norm"], r["aux_loss"]) for r in rows if "loss" in r]


def config_of(data: Path, cp: int, zero_stage: int) -> RunConfig:
    config = tiny_config(data, max_steps=4)
    config.data.seq_len = 64  # a row of one or two documents crosses every cut
    config.parallel = ParallelConfig(cp=cp, zero_stage=zero_stage)
    config.log.every_steps = 1
    config.evaluation.every_steps = 2
    return config


MESHES = [(2, 2, 1), (4, 4, 0)]
"""(processes, cp, ZeRO stage); test_runs.py has others."""


@pytest.mark.slow
def test_runs_equal_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    wanted = run_world(losses_of, 1, config_of(tiny_data, 1, 1), tmp_path / "one")[0]
    assert len(wanted) == 4
    for size, cp, stage in MESHES:
        config = config_of(tiny_data, cp, stage)
        got = run_world(losses_of, size, config, tmp_path / f"{size}-{cp}-{stage}")[0]
        for mine, one in zip(got, wanted, strict=True):
            assert mine == pytest.approx(one, rel=1e-5), (size, cp, stage)
        name = f"{size}-{cp}-{stage}"
        ours, theirs = (held_out_losses(tmp_path / folder) for folder in (name, "one"))
        assert len(theirs) == 2
        assert ours == pytest.approx(theirs, rel=1e-5)


def held_out_losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [row[f"{EVAL_PREFIX}text"] for row in rows if f"{EVAL_PREFIX}text" in row]


def broken_losses(device: torch.device, config: RunConfig, run_dir: Path, broken: str) -> Any:
    if broken == "counts":
        sequence.dist = _Without(dist, "all_reduce")  # type: ignore[assignment]
    return losses_of(device, config, run_dir)


class _Without:
    """A module without what one of its functions does."""

    def __init__(self, module: Any, name: str) -> None:
        self._module, self._name = module, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            return lambda tensor, *args, **options: tensor.zero_() if args else None
        return getattr(self._module, name)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "counts"])
def test_every_exchange_matters(broken: str, tiny_data: Path, tmp_path: Path) -> None:
    wanted = run_world(losses_of, 1, config_of(tiny_data, 1, 1), tmp_path / "one")[0]
    config = config_of(tiny_data, 2, 1)
    got = run_world(broken_losses, 2, config, tmp_path / "two", broken)[0]
    near = [mine == pytest.approx(one, rel=1e-5) for mine, one in zip(got, wanted, strict=True)]
    assert all(near) == (not broken)


@pytest.mark.fast
def test_a_layer_without_a_plan_stops_the_run(one_rank: torch.device, tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    with torch.device("meta"):
        model = TextModel(config.model, config.moe)

    class Windowed(nn.Module):
        def attend(self) -> None: ...

    model.layers[1].self_attn = Windowed()
    with pytest.raises(TypeError, match=r"layers\.1\.self_attn \(Windowed\).*parallel\.cp"):
        spread_rows(model, build_mesh(config.parallel, one_rank), config.parallel)
