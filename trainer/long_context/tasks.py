"""Retrieval from long texts: a question at the end of a text, and the answer that it holds.

An answer is right if each of its tokens is the most likely one behind the text and the answer's
tokens before it. That is so exactly if greedy decoding gives the answer, and needs no decoding.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fulmen.data.config import SourceConfig
from fulmen.data.retrieval import Language, Prompt, language_of, make_prompt
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.data.tokenise import load_tokenizer
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import phase
from fulmen.trainer.long_context.common_words import make_common_words
from fulmen.trainer.long_context.config import TASKS
from fulmen.trainer.prefill import Reader

HAYSTACK_TOKENS = 1_000_000
"""Held-out text that prose is hidden in; a longer haystack repeats it."""


@dataclass(frozen=True)
class Cell:
    """One square of a heat map."""

    task: str
    length: int
    depth: float


@dataclass(frozen=True)
class Score:
    """Of the texts of one cell."""

    answers: int
    right: int
    """Answers of which every token is right."""
    tokens: int
    """Of all answers."""
    tokens_right: int

    @property
    def accuracy(self) -> float:
        """Share of answers that are right."""
        return self.right / self.answers


def depths_of(number: int) -> list[float]:
    """So many depths from the start of a text, 0, to its end, 1."""
    return [0.5] if number == 1 else [place / (number - 1) for place in range(number)]


def make_cell_prompt(cell: Cell, language: Language, *, seed: int, sample: int) -> Prompt:
    """A text of a cell; equal on every mesh, and whatever else is asked for."""
    task = TASKS[cell.task]
    name = zlib.crc32(cell.task.encode())
    rng = np.random.default_rng([seed, name, cell.length, round(cell.depth * 1000), sample])
    try:
        if task.kind == "common_words":
            return make_common_words(language, rng, length=cell.length)
        return make_prompt(
            task.kind,
            language,
            rng,
            length=cell.length,
            depth=cell.depth,
            num_distractors=task.num_distractors,
        )
    except ValueError as error:
        raise ValueError(f"{cell.task} in lengths={cell.length}: {error}") from None


def score_cells(
    reader: Reader,
    language: Language,
    cells: list[Cell],
    *,
    samples: int,
    seed: int,
    mesh: Mesh | None = None,
) -> list[Score]:
    """Every cell's score; all ranks call it, and the texts are shared out between the rows."""
    rows, row = (1, 0) if mesh is None else (mesh.dp, mesh.dp_rank)
    first = mesh is None or mesh.cp_rank == 0
    texts = [(place, sample) for place in range(len(cells)) for sample in range(samples)]
    sums = torch.zeros(len(cells), 4, dtype=torch.long)
    for begin in range(0, len(texts), rows):
        phase("long texts")
        # Towards the end some rows have none left, and read one again for company.
        turn = begin + row
        place, sample = texts[min(turn, len(texts) - 1)]
        prompt = make_cell_prompt(cells[place], language, seed=seed, sample=sample)
        right = answer_tokens_right(reader, prompt, mesh)
        if turn < len(texts) and first:
            sums[place] += torch.tensor([1, all(right), len(right), sum(right)])
    if mesh is not None:
        on_device = sums.to(mesh.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    return [Score(*row) for row in sums.tolist()]


def answer_tokens_right(reader: Reader, prompt: Prompt, mesh: Mesh | None) -> list[bool]:
    """Of each token of the answer, whether it is the most likely one in its place."""
    ids = torch.tensor(prompt.ids + prompt.answer[:-1])
    wanted = len(prompt.answer)
    passes = reader.passes(len(ids), num_logits=wanted)
    if mesh is not None and mesh.dp > 1:
        most = torch.tensor(passes, device=mesh.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        passes = int(most)
    logits, _ = reader.read(ids, num_logits=wanted, passes=passes)
    found: list[int] = logits.argmax(-1).tolist()
    return [a == b for a, b in zip(found, prompt.answer, strict=True)]


def open_language(
    sources: dict[str, SourceConfig], *, vocab_size: int, tokenizer: Path | None = None
) -> Language:
    """What prompts for a model are made of: its tokenizer, and held-out text of its sources."""
    name, source = next(iter(sources.items()))
    if tokenizer is None:
        tokenizer = Path(source.path) / read_manifest(source.path)["tokenizer"]["file"]
    loaded = load_tokenizer(str(tokenizer))

    def texts() -> Iterator[str]:
        split = PreparedSplit(source.path, "valid", name=name, vocab_size=vocab_size, verify=False)
        for ids in _first_documents(split):
            yield loaded.decode(ids)

    return language_of(loaded, texts())


def _first_documents(split: PreparedSplit) -> Iterable[list[int]]:
    total = 0
    for number in range(split.num_documents):
        if total >= HAYSTACK_TOKENS:
            return
        ids = split.document(number).tolist()
        total += len(ids)
        yield ids
