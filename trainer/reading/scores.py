"""How an answer compares to those that are accepted."""

import re
from collections.abc import Sequence

THRESHOLD = 0.5
"""Normalised distance from which on an answer counts as another one, not as a misread one."""


def score(answer: str, truths: Sequence[str], options: Sequence[str] = ()) -> dict[str, float]:
    """`exact_match`, 0 or 1, and `anls`; with options, whether the right one was chosen."""
    if options:
        return {"exact_match": float(chosen_option(answer, options) in truths)}
    return {"exact_match": float(exact_match(answer, truths)), "anls": anls(answer, truths)}


def chosen_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, by its text or by a letter in front."""
    words = _words(answer).lower()
    texts = [_words(option).lower() for option in options]
    letters = [chr(ord("A") + place) for place in range(len(options))]
    if words in texts:
        return letters[texts.index(words)]
    found = re.match(r"\(?([a-z])(?:[).:,]|$)", words)
    letter = found[1].upper() if found else None
    return letter if letter in letters else None


def exact_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether it is one of them, but for white space."""
    return _words(answer) in [_words(truth) for truth in truths]


def anls(answer: str, truths: Sequence[str]) -> float:
    """Similarity of one answer, 0 to 1; its mean over questions is DocVQA's ANLS.

    Of the accepted answers the nearest counts, by its Levenshtein distance over the longer one's
    length, without regard to case; at `THRESHOLD` or beyond, similarity is 0 (Biten et al. 2019).
    """
    return max((_similarity(_words(answer.lower()), _words(t.lower())) for t in truths), default=0)


def _similarity(answer: str, truth: str) -> float:
    distance = levenshtein(answer, truth) / max(len(answer), len(truth), 1)
    return 1 - distance if distance < THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """Least number of characters to insert, delete or replace to make one of the other."""
    row = list(range(len(other) + 1))
    for number, char in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, against in enumerate(other, 1):
            changed = diagonal + (char != against)
            diagonal = row[place]
            row[place] = min(changed, diagonal + 1, row[place - 1] + 1)
    return row[-1]


def _words(text: str) -> str:
    return " ".join(text.split())
