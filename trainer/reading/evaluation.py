"""What one checkpoint reads in images: scores, every answer, and examples to look at."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fulmen.data.config import SourceConfig
from fulmen.data.tokenise import load_tokenizer
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.checkpoint import STATE_FILE
from fulmen.trainer.prefill import Reader
from fulmen.trainer.reading.answers import Answer, answer_texts, mean_scores
from fulmen.trainer.reading.benchmarks import BENCHMARKS, benchmark_questions, list_data
from fulmen.trainer.reading.cards import picture_cards
from fulmen.trainer.reading.config import READING
from fulmen.trainer.reading.examples import FOLDER, keep_examples
from fulmen.trainer.reading.prompts import PromptMaker
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.sources import held_out_questions
from fulmen.trainer.report import write_page
from fulmen.trainer.weights import load_model_config, load_run_config

RESULTS = "reading.json"


@dataclass(frozen=True)
class Settings:
    """What is asked, and how."""

    tasks: list[str]
    """reading and names of BENCHMARKS."""
    sources: list[str] = field(default_factory=list)
    """For reading; none = all that hold out conversations about images."""
    data: Any = None
    """Files of the benchmark."""
    max_documents: int | None = None
    """Of each source, or records of the benchmark; None = all."""
    max_answer_tokens: int = 32
    instruction: str | None = None
    """Behind a benchmark's question; None = the usual one."""


def open_questions(
    checkpoint: Path, tokenizer_file: Path, settings: Settings
) -> dict[str, Iterable[Question]]:
    """Questions by row of the results; ValueError for what can be told to fail without a model."""
    model = load_model_config(checkpoint)
    if model.vision is None:
        raise ValueError(f"tasks={settings.tasks[0]}: the model of {checkpoint} has no eyes")
    asked: dict[str, Iterable[Question]] = {}
    maker = PromptMaker.open(tokenizer_file, model.vision)
    if READING in settings.tasks:
        given = OmegaConf.select(load_run_config(checkpoint), "data.sources") or {}
        sources = {str(name): SourceConfig(path=source.path) for name, source in given.items()}
        for name in settings.sources:
            if name not in sources:
                raise ValueError(f"sources={name}: the run has {', '.join(sources)}")
        _, stored = held_out_questions(
            sources,
            settings.sources,
            model,
            max_documents=settings.max_documents,
            max_answer_tokens=settings.max_answer_tokens,
        )
        asked |= {f"{READING}/{name}": questions for name, questions in stored.items()}
    for name in BENCHMARKS:
        if name in settings.tasks:
            asked[name] = benchmark_questions(
                name,
                list_data(settings.data),
                maker,
                max_records=settings.max_documents,
                max_new_tokens=settings.max_answer_tokens,
                instruction=settings.instruction,
            )
    return asked


def evaluate_reading(
    reader: Reader,
    asked: Mapping[str, Iterable[Question]],
    checkpoint: Path,
    tokenizer_file: Path,
    output: Path,
    *,
    examples: int,
    mesh: Mesh | None = None,
) -> None:
    """Answer, score, print and keep; all ranks call it, rank 0 writes."""
    is_first = mesh is None or mesh.rank == 0
    console, tokenizer = Console(quiet=not is_first), load_tokenizer(str(tokenizer_file))
    table = Table("images", "questions", "exact match", "ANLS")
    for name, questions in asked.items():
        scores: list[dict[str, float]] = []
        kept: list[Answer] = []
        lines: list[dict[str, Any]] = []
        answers = answer_texts(reader, questions, tokenizer, mesh)
        for answer in tqdm(answers, desc=name, disable=None if is_first else True):
            scores.append(answer.scores)
            question = answer.question
            facts = {"name": question.name, "question": question.text, "answer": answer.text}
            lines.append(facts | {"truths": question.truths} | answer.scores)
            if len(kept) < examples:
                kept.append(answer)
        if not scores:
            raise ValueError(f"data: no record for {name}")
        row = {"questions": len(scores)} | mean_scores(scores)
        anls = f"{row['anls']:.1%}" if "anls" in row else ""
        table.add_row(name, f"{len(scores)}", f"{row['exact_match']:.1%}", anls)
        if is_first:
            output.mkdir(parents=True, exist_ok=True)
            source = name.removeprefix(f"{READING}/")
            keep_examples(output, _step_of(checkpoint), source, kept)
            _write(output / FOLDER / f"{source}.jsonl", "".join(map(_line, lines)))
            path = output / RESULTS
            rows = json.loads(path.read_text()) if path.exists() else {}
            _write(path, json.dumps(rows | {name: row}, indent=1))
    console.print(table)
    if is_first:
        page = write_page(output / "reading.html", f"{checkpoint}", picture_cards(output))
        console.print(f"answers: {output / FOLDER}, images: {page}", highlight=False)


def _step_of(checkpoint: Path) -> int:
    """0 for imported weights."""
    file = checkpoint / STATE_FILE
    step: int = json.loads(file.read_text())["step"] if file.exists() else 0
    return step


def _line(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
