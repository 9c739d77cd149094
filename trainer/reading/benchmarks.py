"""Benchmarks of questions about images, from local files as they are published on Hugging Face."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fulmen.data.conversations import RecordError
from fulmen.data.image_reading import (
    SUFFIXES,
    RawRecord,
    ReadLimits,
    raw_fields,
    read_images,
    read_records,
)
from fulmen.data.images import ImageError, ImageLimits, decode_image
from fulmen.data.reading import InputFile, list_input
from fulmen.trainer.reading.prompts import Prompt, PromptMaker
from fulmen.trainer.reading.questions import Question

_LIMITS = ReadLimits(max_bytes=256 * 2**20, names={})


@dataclass(frozen=True)
class Asked:
    """A record of a benchmark without its images."""

    text: str
    truths: tuple[str, ...]
    options: tuple[str, ...] = ()


def _docvqa(fields: Mapping[str, Any]) -> Asked:
    """`question`, and `answers`: a list of those that are accepted."""
    answers = fields.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise RecordError(
            "no_answer", "'answers' is no list of texts; test splits keep them: take another split"
        )
    return Asked(_question(fields), tuple(answers))


def _ai2d(fields: Mapping[str, Any]) -> Asked:
    """`question`, `options`, and `answer`: the number of the right one, from 0."""
    options, answer = fields.get("options"), fields.get("answer")
    if not isinstance(options, list) or not options:
        raise RecordError("wrong_type", "'options' is no list of texts")
    if not str(answer).isdigit() or int(str(answer)) >= len(options):
        raise RecordError("wrong_type", f"answer={answer!r} is no place in 'options', from 0")
    letters = [chr(ord("A") + place) for place in range(len(options))]
    listed = (f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    text = "\n".join([_question(fields), *listed])
    return Asked(text, (letters[int(str(answer))],), tuple(map(str, options)))


def _question(fields: Mapping[str, Any]) -> str:
    question = fields.get("question")
    if not isinstance(question, str):
        raise RecordError("wrong_type", "'question' is no text")
    return question


BENCHMARKS: dict[str, tuple[Callable[[Mapping[str, Any]], Asked], str]] = {
    "docvqa": (_docvqa, "Answer the question using a single word or phrase."),
    "ai2d": (_ai2d, "Answer with the option's letter from the given choices directly."),
}
"""By name: what a record asks, and the line behind it that LLaVA's evaluations put there."""


def list_data(data: Any) -> list[InputFile]:
    """The files that the key `data` names."""
    given = [data] if isinstance(data, str) else list(data or [])
    if not given:
        raise ValueError("data is empty: give the benchmark's files, .parquet, .jsonl or .tar")
    try:
        files = list_input(given, suffixes=SUFFIXES, document_per="file", output=Path("/dev/null"))
    except ValueError as error:
        raise ValueError(f"data={str(error).removeprefix('input=')}") from None
    for file in files:
        if not file.path.endswith(tuple(SUFFIXES)):
            raise ValueError(f"data={file.path}: must end in one of {', '.join(SUFFIXES)}")
    return files


def benchmark_questions(
    name: str,
    files: Sequence[InputFile],
    maker: PromptMaker,
    *,
    max_records: int | None,
    max_new_tokens: int,
    instruction: str | None,
) -> Iterator[Question]:
    """The questions of a benchmark's records, in their order, one at a time.

    ValueError that names the file and record for a broken one: none is left out, for numbers of
    fewer questions could not be compared.
    """
    ask, usual = BENCHMARKS[name]
    behind = usual if instruction is None else instruction
    records = (raw for chunk in read_records(files, _LIMITS) for raw in chunk)
    for raw in islice(records, max_records):
        where = f"{files[raw.file].path}, record {raw.row}"
        try:
            fields = raw_fields(raw)
            asked = ask(fields)
        except RecordError as error:
            raise ValueError(f"data: {where}: {error.reason}") from None
        text = f"{asked.text}\n{behind}" if behind else asked.text
        yield Question(
            f"{raw.file}-{raw.row}",
            asked.text,
            asked.truths,
            max_new_tokens,
            maker.stop_ids,
            partial(_make_prompt, maker, raw, fields, text, where),
            asked.options,
        )


def _make_prompt(
    maker: PromptMaker, raw: RawRecord, fields: Mapping[str, Any], text: str, where: str
) -> Prompt:
    try:
        blobs = read_images(raw, fields, _LIMITS)
        if not blobs:
            raise RecordError("missing_image", "no image")
        images = [decode_image(blob, ImageLimits()) for blob in blobs]
    except (RecordError, ImageError) as error:
        raise ValueError(f"data: {where}: {error.kind}: {error.reason}") from None
    return maker.make(text, images, chat=True)
