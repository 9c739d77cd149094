"""What one checkpoint reads in images: scores, every answer, and examples to look at."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
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
from fulmen.trainer.reading.benchmarks import benchmark_questions, list_data
from fulmen.trainer.reading.cards import picture_cards
from fulmen.trainer.reading.config import READING
from fulmen.trainer.reading.examples import FOLDER, keep_examples
from fulmen.trainer.reading.prompts import PromptMaker
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.sources import held_out_questions
from fulmen.trainer.report import write_page
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.weights import load_model_config

RESULTS = "reading.json"


def open_questions(
    checkpoint: Path,
    tokenizer_file: Path,
    *,
    tasks: Sequence[str],
    sources: Sequence[str],
    data: Any,
    max_documents: int | None,
    max_answer_tokens: int,
    instruction: str | None,
) -> dict[str, Iterable[Question]]:
    """Questions by row of the results; ValueError for what can be told to fail without a model.

    Args:
        checkpoint: of the model, whose tower and sources count.
        tokenizer_file: its tokenizer.json.
        tasks: reading, and names of BENCHMARKS.
        sources: for reading; none = all that hold out conversations about images.
        data: files of the benchmark.
        max_documents: of each source, or records of the benchmark; None = all.
        max_answer_tokens: longer stored answers are left out, those to a benchmark are cut.
        instruction: line behind a benchmark's question; None = the usual one.
    """
    if not tasks:
        return {}
    model = load_model_config(checkpoint)
    if model.vision is None:
        raise ValueError(f"tasks={tasks[0]}: the model of {checkpoint} has no eyes")
    maker = PromptMaker.open(tokenizer_file, model.vision)
    asked: dict[str, Iterable[Question]] = {}
    if READING in tasks:
        given = OmegaConf.select(load_run_config(checkpoint), "data.sources") or {}
        known = {str(name): SourceConfig(path=source.path) for name, source in given.items()}
        for name in sources:
            if name not in known:
                raise ValueError(f"sources={name}: the run has {', '.join(known)}")
        _, stored = held_out_questions(
            known,
            sources,
            model,
            max_documents=max_documents,
            max_answer_tokens=max_answer_tokens,
        )
        asked |= {f"{READING}/{name}": questions for name, questions in stored.items()}
    for name in (task for task in tasks if task != READING):
        questions = benchmark_questions(
            name,
            list_data(data),
            maker,
            max_records=max_documents,
            max_new_tokens=max_answer_tokens,
            instruction=instruction,
        )
        first = next(questions, None)
        if first is None:
            raise ValueError(f"data={data}: holds no record")
        first.make_prompt()  # what is wrong with all records is told now
        asked[name] = chain([first], questions)
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
