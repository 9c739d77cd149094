"""Greedy answers to questions about images, on one process or over the ranks of a mesh."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import phase
from fulmen.trainer.prefill import Reader
from fulmen.trainer.prompt_images import PromptImages
from fulmen.trainer.reading.questions import Question
from fulmen.trainer.reading.scores import score


@dataclass(frozen=True)
class Answer:
    """What a model says to a question."""

    question: Question
    text: str
    """Special tokens included: they make an answer wrong."""
    scores: dict[str, float]


def answer_texts(
    reader: Reader, questions: Iterable[Question], tokenizer: Tokenizer, mesh: Mesh | None = None
) -> Iterator[Answer]:
    """Each question with its answer in words; all ranks call it with equal questions."""
    for question, ids in answer_all(reader, questions, mesh):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        yield Answer(question, text, score(text, question.truths, question.options))


def mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each score; there is one answer at least."""
    rows = list(scores)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def answer_all(
    reader: Reader, questions: Iterable[Question], mesh: Mesh | None = None
) -> Iterator[tuple[Question, list[int]]]:
    """Each question with the tokens of its answer, without the one that ends it.

    All ranks call it with equal questions, and all get every answer: the rows of the mesh take one
    question each and decode in step, for each pass is collective where weights are spread.
    """
    rows = 1 if mesh is None else mesh.dp
    waiting = iter(questions)
    while turn := list(islice(waiting, rows)):
        yield from zip(turn, _decode(reader, turn, mesh), strict=True)


def _decode(reader: Reader, turn: Sequence[Question], mesh: Mesh | None) -> list[list[int]]:
    phase("reading")
    row = 0 if mesh is None else mesh.dp_rank
    # Towards the end some rows have none left, and read one again for company.
    prompt = turn[min(row, len(turn) - 1)].make_prompt()
    vision = reader.model.config.vision
    assert vision is not None
    images = PromptImages.of(
        prompt.pictures, tile_size=vision.tile_size, rank=reader.rank, ranks=reader.ranks
    )
    longest = max(question.max_new_tokens for question in turn)
    logits, cache = reader.read(
        torch.tensor(prompt.ids),
        new_tokens=longest,
        passes=_most(reader.passes(len(prompt.ids), num_logits=1), mesh),
        images=images,
    )
    next_logits = logits[-1]
    answers: list[list[int]] = [[] for _ in turn]
    open_answers = set(range(len(turn)))
    while True:
        tokens = _tokens_of_rows(int(next_logits.argmax()), mesh)
        for place in list(open_answers):
            question, token = turn[place], tokens[place]
            if token not in question.stop_ids:
                answers[place].append(token)
            if token in question.stop_ids or len(answers[place]) == question.max_new_tokens:
                open_answers.remove(place)
        if not open_answers:
            return answers
        next_logits = reader.step(torch.tensor([tokens[row]]), cache)


def _tokens_of_rows(token: int, mesh: Mesh | None) -> list[int]:
    """The next token of every row, as its first rank has it."""
    if mesh is None:
        return [token]
    tokens = torch.zeros(mesh.dp, dtype=torch.long, device=mesh.device)
    if mesh.cp_rank == 0:
        tokens[mesh.dp_rank] = token
    dist.all_reduce(tokens)
    found: list[int] = tokens.tolist()
    return found


def _most(passes: int, mesh: Mesh | None) -> int:
    if mesh is None or mesh.dp == 1:
        return passes
    most = torch.tensor(passes, device=mesh.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
