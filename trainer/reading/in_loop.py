"""Reading of held-out images beside training, and what it and a checkpoint's evaluation share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from fulmen.data.config import SourceConfig
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer
from fulmen.models.text import TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.inputs import check_images
from fulmen.trainer.prefill import Reader
from fulmen.trainer.reading.answers import answer_all
from fulmen.trainer.reading.examples import keep_examples
from fulmen.trainer.reading.questions import Question, holds_conversations, stored_questions
from fulmen.trainer.reading.scores import anls, exact_match


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
        splits = open_splits(config.data.sources, asked.sources, config.model.vocab_size)
        check_images(list(splits.values()), config.model.vision)
        tokenizer = tokenizer_of(next(iter(splits.values())))
        questions = {
            name: stored_questions(
                split,
                tokenizer,
                max_documents=asked.max_documents,
                max_answer_tokens=asked.max_answer_tokens,
            )
            for name, split in splits.items()
        }
        check_questions(questions, "evaluation.reading.")
        reader = Reader(model, mesh=mesh)
        return cls(
            asked.every_steps, model, mesh, reader, questions, tokenizer, asked.examples, run_dir
        )

    def scores(self, step: int) -> dict[str, float]:
        """`reading/SOURCE/exact_match` and `.../anls`; rank 0 keeps examples. All ranks call it."""
        self.model.eval()
        scores: dict[str, float] = {}
        for source, questions in self.questions.items():
            answered = answer_texts(self.reader, questions, self.tokenizer, self.mesh)
            scores |= {
                f"reading/{source}/{name}": sum(values) / len(values)
                for name, values in score(answered).items()
            }
            if self.mesh.rank == 0:
                rows = [(q, text, exact_match(text, q.truths)) for q, text in answered]
                keep_examples(self.run_dir, step, source, rows[: self.examples])
        self.model.train()
        return scores


def open_splits(
    sources: Mapping[str, SourceConfig], names: list[str], vocab_size: int
) -> dict[str, PreparedSplit]:
    """The held-out documents of these sources, or of all that hold conversations about images."""
    splits = {
        name: PreparedSplit(source.path, "valid", name=name, vocab_size=vocab_size, verify=False)
        for name, source in sources.items()
        if name in names or (not names and "tiling" in read_manifest(source.path))
    }
    kept = {name: split for name, split in splits.items() if names or holds_conversations(split)}
    if not kept:
        raise ValueError(
            "reading: no source of data.sources holds conversations about images: name one that "
            "has questions, or leave reading out (evaluation.reading.every_steps=null)"
        )
    return kept


def tokenizer_of(split: PreparedSplit) -> Tokenizer:
    """The one that a folder was prepared with."""
    return load_tokenizer(str(split.path / read_manifest(split.path)["tokenizer"]["file"]))


def check_questions(questions: Mapping[str, list[Question]], key: str) -> None:
    """ValueError for a source that has none."""
    for name, found in questions.items():
        if not found:
            raise ValueError(
                f"{key}sources: the held-out documents of {name} have no question about an image "
                f"with an answer of {key}max_answer_tokens or fewer"
            )


def answer_texts(
    reader: Reader, questions: Iterable[Question], tokenizer: Tokenizer, mesh: Mesh | None
) -> list[tuple[Question, str]]:
    """Each question and its answer in words, special tokens included."""
    return [
        (question, tokenizer.decode(ids, skip_special_tokens=False))
        for question, ids in answer_all(reader, questions, mesh)
    ]


def score(answered: Iterable[tuple[Question, str]]) -> dict[str, list[float]]:
    """`exact_match` and `anls` of each answer."""
    found: dict[str, list[float]] = {"exact_match": [], "anls": []}
    for question, text in answered:
        found["exact_match"].append(float(exact_match(text, question.truths)))
        found["anls"].append(anls(text, question.truths))
    return found
