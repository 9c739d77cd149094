"""How an answer compares to those that are accepted."""

from collections.abc import Sequence

THRESHOLD = 0.5
"""Normalised distance from which on an answer counts as another one, not as a misread one."""


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
