"""Examples of what a model read, kept with their images for whoever wants to look."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulmen.trainer.reading.answers import Answer

FOLDER, FILE = "reading", "examples.jsonl"
MAX_SIDE = 360
"""Pixels of a kept image."""


@dataclass(frozen=True)
class Example:
    """A question and how it was answered."""

    step: int
    source: str
    question: str
    answer: str
    truths: tuple[str, ...]
    right: bool
    images: tuple[str, ...]
    """Files in the same folder."""


def keep_examples(output: Path, step: int, source: str, answers: "Sequence[Answer]") -> None:
    """Write some questions with answers into `output`/reading.

    Those of the source from this step on are replaced: a resumed run does that work again.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        row for row in read_examples(output) if row["source"] != source or row["step"] < step
    ]
    for answer in answers:
        question, names = answer.question, []
        for number, picture in enumerate(question.make_prompt().pictures):
            name = re.sub(r"[^\w.-]", "_", f"{source}-{question.name}-{number}.png")
            small = picture.image.copy()
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            small.save(folder / name)
            names.append(name)
        kept = Example(
            step,
            source,
            question.text,
            answer.text,
            question.truths,
            bool(answer.scores["exact_match"]),
            tuple(names),
        )
        rows.append(asdict(kept))
    draft = folder / f".{FILE}.tmp"
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(folder / FILE)


def read_examples(output: Path) -> list[dict[str, Any]]:
    """All that `keep_examples` has written there, in its order."""
    path = output / FOLDER / FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
