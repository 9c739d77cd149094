"""Retrieval and question answering over long texts: prompts with known answers, and documents.

A document hides facts in a haystack and asks for them later, some at once and some at its end:
many questions of all distances, so that much of what there is to learn from it is retrieval. A
prompt is such a text up to a last question. Both are built from the same exercises and in either
language: see haystack.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fulmen.data.haystack import (
    KINDS,
    Exercise,
    Exercises,
    Language,
    Piece,
    Prose,
    Words,
    language_of,
    piece_of,
)

__all__ = [
    "KINDS",
    "Language",
    "Prompt",
    "Prose",
    "Words",
    "language_of",
    "make_document",
    "make_prompt",
]

# Share of a document's tokens that exercises may take.
_LARGEST_SHARE = 0.6
_AT_THE_END = 2.0
# Draws of a document, of which some cannot have exactly the length that is asked for.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Prompt:
    """A question about a long text, and the answer that a model should continue it with."""

    text: str
    ids: list[int]
    """Tokens of the text."""
    answer_text: str
    answer: list[int]
    depth: float
    """Where the first fact begins: tokens before it over all tokens before the question."""


def make_prompt(
    kind: str,
    language: Language,
    rng: np.random.Generator,
    *,
    length: int,
    depth: float | None = None,
    num_distractors: int = 0,
) -> Prompt:
    """One question, of one of KINDS, at the end of a text: prompt and answer are `length` tokens.

    The first fact is put `depth` (0 to 1) of the text deep, at the nearest end of a sentence;
    where there are several facts the others follow at random depths below it. None draws the
    depth. `num_distractors` other exercises of the kind are hidden too and never asked for: with
    them "needle" becomes retrieval among many keys.
    """
    _check_kind(kind)
    source = language.exercises(rng)
    asked, *others = [_next(source, kind) for _ in range(1 + num_distractors)]
    first = float(rng.random()) if depth is None else depth
    later = np.sort(rng.uniform(first, 1.0, len(asked.facts) - 1)).tolist()
    facts = _facts(asked, [first, *later])
    distractors = [
        event for other in others for event in _facts(other, sorted(rng.random(len(other.facts))))
    ]
    answer, question = piece_of(language, asked.answer), piece_of(language, asked.question)
    hidden = [(place, piece_of(language, text)) for place, text in facts]
    beside = [(place, piece_of(language, text)) for place, text in distractors]
    taken = question.num_tokens + answer.num_tokens
    taken += sum(piece.num_tokens for _, piece in hidden + beside)
    if taken > length:
        raise ValueError(
            f"a prompt of {length} tokens has no room for its facts and its question, which take "
            f"{taken}: ask for a longer one, or for fewer distractors"
        )
    without = {piece.text for _, piece in hidden + beside}
    pieces = _interleave(language.haystack(rng, length - taken, without=without), beside)
    # The facts come last, so that their depth is one among all that is before the question.
    pieces = _interleave(pieces, hidden)
    ids = np.concatenate([*(piece.ids for piece in pieces), question.ids])
    begin = next(at for at, piece in enumerate(pieces) if piece is hidden[0][1])
    before = sum(piece.num_tokens for piece in pieces[:begin])
    return Prompt(
        text="".join(piece.text for piece in pieces) + asked.question,
        ids=ids.tolist(),
        answer_text=asked.answer,
        answer=answer.ids.tolist(),
        depth=before / (len(ids) - question.num_tokens),
    )


def make_document(
    kinds: Mapping[str, float], language: Language, rng: np.random.Generator, *, length: int
) -> str:
    """A text of `length` tokens, its end-of-document token included, full of exercises.

    `kinds` are the relative frequencies of exercises. Their number is drawn anew for each text,
    from a few to as many as the language bears.
    """
    for kind in kinds:
        _check_kind(kind)
    for _ in range(_ATTEMPTS):
        text = _try_document(kinds, language, rng, length - 1)
        if text is not None:
            return text
    raise ValueError(
        f"no text of exactly {length} tokens could be made with this tokenizer: give another one"
    )


def _try_document(
    kinds: Mapping[str, float], language: Language, rng: np.random.Generator, wanted: int
) -> str | None:
    """One draw of exercises with a haystack around them, or None if it misses `wanted` tokens."""
    exercises = _draw_exercises(kinds, language, rng, wanted)
    events: list[tuple[float, str]] = []
    for exercise in exercises:
        places = sorted(rng.random(len(exercise.facts)))
        events += _facts(exercise, places)
        late = _AT_THE_END + rng.random()
        place = late if rng.random() < 0.5 else rng.uniform(places[-1], 1.0)
        events.append((place, exercise.question + exercise.answer + exercise.end))
    inserted = [(place, piece_of(language, text)) for place, text in events]
    room = wanted - sum(piece.num_tokens for _, piece in inserted)
    without = {text for exercise in exercises for text in exercise.facts}
    start = rng.bit_generator.state
    for _ in range(8):
        rng.bit_generator.state = start
        pieces = _interleave(language.haystack(rng, room, without=without), inserted)
        text = "".join(piece.text for piece in pieces)
        # Tokenizers that merge over the ends of pieces make other counts of the whole.
        surplus = len(language.encode(text)) - wanted
        if not surplus:
            return text
        room = max(0, room - surplus)
    return None


def _draw_exercises(
    kinds: Mapping[str, float], language: Language, rng: np.random.Generator, length: int
) -> list[Exercise]:
    names = list(kinds)
    shares = np.array([kinds[name] for name in names]) / sum(kinds.values())
    least, most = language.spacing
    count = max(1, int(length / np.exp(rng.uniform(np.log(least), np.log(most)))))
    source = language.exercises(rng)
    drawn: list[Exercise] = []
    room = length * _LARGEST_SHARE
    for number in rng.choice(len(names), count, p=shares):
        exercise = source.make(names[number])
        if exercise is None:
            continue
        asked = exercise.question + exercise.answer + exercise.end
        room -= sum(len(language.encode(text)) for text in (*exercise.facts, asked))
        if room < 0:
            break
        drawn.append(exercise)
    return drawn


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kinds: {kind} is unknown: choose from {', '.join(KINDS)}")


def _next(source: Exercises, kind: str) -> Exercise:
    exercise = source.make(kind)
    if exercise is None:
        raise ValueError(
            f"there are not enough keys, values or passages for so many distractors of kind {kind}"
        )
    return exercise


def _facts(exercise: Exercise, places: Sequence[float]) -> list[tuple[float, str]]:
    return [(float(place), fact) for place, fact in zip(places, exercise.facts, strict=True)]


def _interleave(haystack: Sequence[Piece], inserted: list[tuple[float, Piece]]) -> list[Piece]:
    """The haystack with each of `inserted` at the end of a piece nearest to its place, in order."""
    ends = np.cumsum([0, *(piece.num_tokens for piece in haystack)])
    middles = (ends[:-1] + ends[1:]) / 2
    inserted = sorted(inserted, key=lambda one: one[0])
    wanted = np.array([place for place, _ in inserted]) * ends[-1]
    bounds = [0, *np.searchsorted(middles, wanted).tolist(), len(haystack)]
    pieces: list[Piece] = []
    for (begin, end), piece in zip(pairwise(bounds), [*inserted, None], strict=True):
        pieces += haystack[begin:end]
        if piece is not None:
            pieces.append(piece[1])
    return pieces
