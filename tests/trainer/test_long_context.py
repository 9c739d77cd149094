"""Retrieval and loss by position: scores, how ranks share them, and pictures."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.folders import write_folder
from support.tiny import tiny_config
from support.worlds import run_world
from torch import Tensor

from fulmen.data.retrieval import Words
from fulmen.data.shards import PreparedSplit
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.long_context import tasks
from fulmen.trainer.long_context.config import TASKS, LongContextConfig
from fulmen.trainer.long_context.evaluation import Results, draw
from fulmen.trainer.long_context.in_loop import LongContext
from fulmen.trainer.long_context.pictures import short_length
from fulmen.trainer.long_context.positions import bin_edges, position_loss
from fulmen.trainer.long_context.tasks import (
    Cell,
    Score,
    depths_of,
    make_cell_prompt,
    open_language,
    score_cells,
)
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics

LANGUAGE = Words(num_keys=64, num_fillers=32)
HIDDEN = [task for task in TASKS if task not in ("many_keys", "common_words")]
CELLS = [Cell(task, length, depth) for task in HIDDEN for length in (200, 301) for depth in (0, 1)]


class Oracle:
    """Reads as a `Reader` does, and knows the answers to texts whose last token is even."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers = answers
        self.read_passes: list[int] = []

    def passes(self, tokens: int, *, num_logits: int = 0) -> int:
        return tokens % 7

    def read(self, ids: Tensor, *, num_logits: int, passes: int) -> tuple[Tensor, None]:
        self.read_passes.append(passes)
        text = tuple(ids.tolist())
        answer = self.answers[text]
        knows = text[0] % 2 == 0
        chosen = answer if knows else [answer[0], *[0] * (len(answer) - 1)]
        return torch.nn.functional.one_hot(torch.tensor(chosen), LANGUAGE.vocab_size).float(), None

    def losses(self, ids: Tensor, *, passes: int = 0) -> Tensor:
        return 0.5 * ids[1:].float()


def make_oracle(samples: int) -> Oracle:
    answers = {}
    for cell in CELLS:
        for sample in range(samples):
            prompt = make_cell_prompt(cell, LANGUAGE, seed=4, sample=sample)
            answers[tuple(prompt.ids + prompt.answer[:-1])] = prompt.answer
    return Oracle(answers)


def oracle_scores(device: torch.device, parallel: ParallelConfig) -> tuple[list[Score], list[int]]:
    oracle: Any = make_oracle(3)
    mesh = build_mesh(parallel, device)
    return score_cells(oracle, LANGUAGE, CELLS, samples=3, seed=4, mesh=mesh), oracle.read_passes


@pytest.mark.fast
def test_an_answer_is_right_if_all_of_it_is() -> None:
    oracle: Any = make_oracle(3)
    scores = score_cells(oracle, LANGUAGE, CELLS, samples=3, seed=4)
    known = [ids[0] % 2 == 0 for ids in oracle.answers]
    assert any(known)
    assert not all(known)
    assert sum(score.right for score in scores) == sum(known)
    assert {score.answers for score in scores} == {3}
    for cell, score in zip(CELLS, scores, strict=True):
        each = score.tokens // 3
        assert score.tokens == 3 * each >= 6, cell
        assert score.tokens_right == score.right * each + (3 - score.right)
        assert score.accuracy == score.right / 3


@pytest.mark.parametrize(
    ("size", "parallel"), [(3, ParallelConfig()), (4, ParallelConfig(cp=2))], ids=["dp 3", "cp 2"]
)
def test_ranks_share_out_the_texts(size: int, parallel: ParallelConfig) -> None:
    oracle: Any = make_oracle(3)
    alone = score_cells(oracle, LANGUAGE, CELLS, samples=3, seed=4)
    results = run_world(oracle_scores, size, parallel)
    rows = size // parallel.cp
    for scores, passes in results:
        assert scores == alone
        assert len(passes) == -(-len(CELLS) * 3 // rows)
        assert passes == results[0][1]  # idle passes make up for shorter texts


@pytest.mark.fast
def test_texts_have_the_length_and_depth_of_their_cell() -> None:
    for cell in [Cell("niah", 500, depth) for depth in depths_of(5)]:
        prompt = make_cell_prompt(cell, LANGUAGE, seed=0, sample=0)
        assert len(prompt.ids) + len(prompt.answer) == 500
        assert abs(prompt.depth - cell.depth) < 0.05
        again = make_cell_prompt(cell, LANGUAGE, seed=0, sample=0)
        assert again == prompt
        assert make_cell_prompt(cell, LANGUAGE, seed=0, sample=1).ids != prompt.ids
    assert depths_of(1) == [0.5]
    assert depths_of(3) == [0.0, 0.5, 1.0]


@pytest.mark.fast
def test_loss_by_position(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    documents = [chance.integers(1, 60, n).tolist() for n in (40, 300, 255, 256, 400)]
    write_folder(tmp_path / "data", [[1, 2]], documents)
    split = PreparedSplit(tmp_path / "data", "valid", name="text", vocab_size=1000)
    oracle: Any = Oracle({})
    found = position_loss(oracle, split, length=256, samples=2)
    assert found is not None
    assert found.documents == 2  # those of 300 and of 256 tokens
    assert found.edges[0] == 1
    assert found.edges[-1] == 256
    for bin, (first, end) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        wanted = np.mean([0.5 * np.array(documents[d][first:end]) for d in (1, 3)])
        assert found.losses[bin] == pytest.approx(wanted)
    assert position_loss(oracle, split, length=401, samples=2) is None
    assert bin_edges(10) == [1, 2, 4, 5, 8, 10]


@pytest.mark.fast
def test_rows_of_the_same_settings_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, {"seed": 0}).add("niah/64", {"accuracy": 1.0})
    assert Results(path, {"seed": 0}).rows == {"niah/64": {"accuracy": 1.0}}
    assert Results(path, {"seed": 1}).rows == {}


@pytest.mark.fast
def test_pictures(tmp_path: Path) -> None:
    depths = {"0.000": {"accuracy": 0.0}, "1.000": {"accuracy": 1.0}}
    rows = {f"niah/{n}": {"accuracy": 0.5, "depths": depths} for n in (1024, 4096)}
    curve = {"documents": 3, "edges": [1, 8, 64], "losses": [2.0, 1.0]}
    draw(tmp_path, rows | {"position_loss/text/64": curve}, 1024)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["niah.png", "position_loss.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert [short_length(n) for n in (512, 8192, 1 << 22, 1000)] == ["512", "8K", "4M", "1000"]


def train(device: torch.device, config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    trainer.fit()
    trainer.close()
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(zero_stage=3), ParallelConfig(cp=2, ep=2)],
    ids=["dp 2, zero 3", "cp 2, ep 2"],
)
def test_in_the_loop(parallel: ParallelConfig, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, max_steps=3)
    config.parallel = parallel
    plain = run_world(train, 2, config, tmp_path / "plain")[0]
    config.evaluation.long_context = LongContextConfig(
        every_steps=2, tasks=["niah", "tracking"], lengths=[600, 777], depths=3, chunk_tokens=256
    )
    rows = run_world(train, 2, config, tmp_path / "evaluated")[0]
    names = {f"{task}/{length}" for task in ("niah", "tracking") for length in (600, 777)}
    scored = [row for row in rows if "niah/600" in row]
    assert [row["step"] for row in scored] == [2, 3]
    assert all(names <= row.keys() for row in scored)
    assert all(0 <= row[name] <= 1 for row in scored for name in names)
    # Training goes on as if nothing had been.
    losses = [[row["loss"] for row in run if "loss" in row] for run in (plain, rows)]
    assert losses[0] == losses[1]


def test_each_text_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle: Any = make_oracle(3)
    seen: list[str] = []
    monkeypatch.setattr(tasks, "phase", seen.append)
    score_cells(oracle, LANGUAGE, CELLS, samples=3, seed=4)
    assert seen == ["long texts"] * (3 * len(CELLS))


def test_a_length_too_short_for_a_task_is_told_at_the_start(tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    nothing: Any = None
    config.evaluation.long_context = LongContextConfig(every_steps=5, lengths=[4000, 20])
    message = r"^evaluation\.long_context: niah in lengths=20: a prompt of 20 tokens has no room"
    with pytest.raises(ValueError, match=message):
        LongContext.open(config, nothing, nothing)


def test_bad_keys_are_named(tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    for changes, message in [
        ({"tasks": ["haystack"]}, "evaluation.long_context.tasks=haystack"),
        ({"tasks": []}, "evaluation.long_context.tasks is empty"),
        ({"depths": 0}, "evaluation.long_context.depths=0"),
        ({"samples": 0}, "evaluation.long_context.samples=0"),
        ({"lengths": [1]}, "evaluation.long_context.lengths"),
        ({"every_steps": 0}, "evaluation.long_context.every_steps=0"),
        ({"chunk_tokens": 0}, "evaluation.long_context.chunk_tokens=0"),
    ]:
        config.evaluation.long_context = LongContextConfig(**changes)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            check_config(config, 1)


def test_a_language_of_prepared_text(tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    language = open_language(config.data.sources, vocab_size=config.model.vocab_size)
    prompt = make_cell_prompt(Cell("niah", 700, 0.5), language, seed=0, sample=0)
    assert len(prompt.ids) + len(prompt.answer) == 700
    assert prompt.answer_text.strip() in prompt.text


def test_common_words(tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    language = open_language(config.data.sources, vocab_size=config.model.vocab_size)
    cell = Cell("common_words", 1500, 0.0)
    prompt = make_cell_prompt(cell, language, seed=0, sample=0)
    assert len(prompt.ids) + len(prompt.answer) == 1500
    listed = prompt.text[prompt.text.index("Memorise") :].splitlines()[1:-1]
    counts = Counter(listed).most_common(4)
    assert [word for word, _ in counts[:3]] == prompt.answer_text.split(", ")
    assert len({count for _, count in counts}) == 4  # each place is decided
    assert make_cell_prompt(cell, language, seed=0, sample=1).answer != prompt.answer
    with pytest.raises(ValueError, match="no room for common words"):
        make_cell_prompt(Cell("common_words", 100, 0.0), language, seed=0, sample=0)
    with pytest.raises(ValueError, match="leave it out"):
        make_cell_prompt(cell, LANGUAGE, seed=0, sample=0)
