"""Reading of held-out images beside training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from fulmen.models.text import TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.prefill import Reader
from fulmen.trainer.reading.answers import answer_texts, mean_scores
from fulmen.trainer.reading.examples import keep_examples
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.sources import held_out_questions
from fulmen.trainer.run_log import log


@dataclass
class Reading:
    """The questions that `evaluation.reading` asks for, and who answers them."""

    every: int
    """Steps from one time to the next."""
    model: TextModel
    mesh: Mesh
    reader: Reader
    questions: dict[str, list[Question]]
    """By source."""
    tokenizer: Tokenizer
    examples: int
    run_dir: Path

    @classmethod
    def open(cls, config: RunConfig, model: TextModel, mesh: Mesh, run_dir: Path) -> Self | None:
        """None where nothing is asked for; ValueError where there is nothing to ask."""
        asked = config.evaluation.reading
        if asked.every_steps is None:
            return None
        tokenizer, questions = open_questions(config)
        reader = Reader(model, mesh=mesh)
        return cls(
            asked.every_steps, model, mesh, reader, questions, tokenizer, asked.examples, run_dir
        )

    def scores(self, step: int) -> dict[str, float]:
        """`reading/SOURCE/exact_match` and `.../anls`; rank 0 keeps examples. All ranks call it."""
        self.model.eval()
        scores: dict[str, float] = {}
        for source, questions in self.questions.items():
            answers = list(answer_texts(self.reader, questions, self.tokenizer, self.mesh))
            means = mean_scores(answer.scores for answer in answers)
            scores |= {f"reading/{source}/{name}": value for name, value in means.items()}
            if self.mesh.rank == 0:
                try:
                    keep_examples(self.run_dir, step, source, answers[: self.examples])
                except OSError as error:  # a full disk is no reason to end a run
                    log.warning("answers of step %d could not be kept: %s", step, error)
        self.model.train()
        return scores


def open_questions(config: RunConfig) -> tuple[Tokenizer, dict[str, list[Question]]]:
    """What `evaluation.reading` asks for, by source; ValueError where there is nothing to ask."""
    asked = config.evaluation.reading
    return held_out_questions(
        config.data.sources,
        asked.sources,
        config.model,
        max_documents=asked.max_documents,
        max_answer_tokens=asked.max_answer_tokens,
    )
