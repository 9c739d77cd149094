"""Retrieval from long texts beside training."""

from dataclasses import dataclass
from typing import Self

from fulmen.data.retrieval import Language
from fulmen.models.text import TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.long_context.tasks import (
    Cell,
    depths_of,
    make_cell_prompt,
    open_language,
    score_cells,
)
from fulmen.trainer.prefill import Reader


@dataclass
class LongContext:
    """The texts that `evaluation.long_context` asks for, and who reads them."""

    every: int
    """Steps from one time to the next."""
    model: TextModel
    mesh: Mesh
    reader: Reader
    language: Language
    cells: list[Cell]
    samples: int
    seed: int

    @classmethod
    def open(cls, config: RunConfig, model: TextModel, mesh: Mesh) -> Self | None:
        """None where nothing is asked for; ValueError for lengths too short for a task."""
        asked = config.evaluation.long_context
        if asked.every_steps is None:
            return None
        language, cells = open_texts(config)
        return cls(
            asked.every_steps,
            model,
            mesh,
            Reader(model, chunk_tokens=asked.chunk_tokens, mesh=mesh),
            language,
            cells,
            asked.samples,
            config.seed,
        )

    def scores(self) -> dict[str, float]:
        """Share of right answers by `TASK/LENGTH`; all ranks call it."""
        self.model.eval()
        scores = score_cells(
            self.reader,
            self.language,
            self.cells,
            samples=self.samples,
            seed=self.seed,
            mesh=self.mesh,
        )
        self.model.train()
        sums: dict[str, tuple[int, int]] = {}
        for cell, score in zip(self.cells, scores, strict=True):
            name = f"{cell.task}/{cell.length}"
            right, answers = sums.get(name, (0, 0))
            sums[name] = right + score.right, answers + score.answers
        return {name: right / answers for name, (right, answers) in sums.items()}


def open_texts(config: RunConfig) -> tuple[Language, list[Cell]]:
    """What `evaluation.long_context` asks for; ValueError for lengths too short for a task."""
    asked = config.evaluation.long_context
    language = open_language(config.data.sources, vocab_size=config.model.vocab_size)
    lengths = asked.lengths or [config.data.seq_len]
    cells = [
        Cell(task, length, depth)
        for task in asked.tasks
        for length in lengths
        for depth in depths_of(asked.depths)
    ]
    for task in asked.tasks:
        shortest = Cell(task, min(lengths), depth=0.0)
        for sample in range(asked.samples):
            try:
                make_cell_prompt(shortest, language, seed=config.seed, sample=sample)
            except ValueError as error:
                raise ValueError(f"evaluation.long_context: {error}") from None
    return language, cells
