"""RULER's common words: a long list of words, of which some come more often than the others.

No fact lies in one place: the whole text has to be counted. Unlike in RULER each common word has a
frequency of its own, so that the answer has one order.
"""

import re
from itertools import chain

import numpy as np

from fulmen.data.retrieval import Language, Prompt, Prose

COMMON = 3
"""Words that are asked for; the n-th of them comes COMMON - n + 2 times as often as others."""
SAMPLE_TOKENS = 4000
"""Of the haystack that words are taken from."""
WORD = re.compile(r"\b[a-z]{3,10}\b")
INTRODUCTION = (
    "Below is a list of words. Some of them appear more often than others. Memorise the ones that "
    "appear most often.\n"
)
QUESTION = (
    f"Question: What are the {COMMON} most common words in the list above? Answer: The {COMMON} "
    "words that appear most often in the list are:"
)


def make_common_words(language: Language, rng: np.random.Generator, *, length: int) -> Prompt:
    """Prompt and answer, `length` tokens in all; real text fills up what the list leaves."""
    if not isinstance(language, Prose):
        raise ValueError(
            "tasks: common_words asks in English, which a model of the synthetic language does not "
            "read: leave it out"
        )
    text = " ".join(piece.text for piece in language.haystack(rng, SAMPLE_TOKENS))
    words = rng.permutation(sorted(set(WORD.findall(text)))).tolist()
    if len(words) < 2 * COMMON:
        raise ValueError("tasks: common_words finds too few words in the haystack: leave it out")
    answer = language.encode(f" {', '.join(words[:COMMON])}")
    question = language.encode(QUESTION)
    room = length - len(answer) - len(question)
    mean = len(language.encode("\n".join(words))) / len(words)
    weights = np.array([COMMON + 1 - place for place in range(COMMON)] + [1] * len(words[COMMON:]))
    entries = max(0, int(0.95 * (room - len(language.encode(INTRODUCTION))) / mean))
    # Of the others as many as can come twice.
    kept = min(len(words), max(2 * COMMON, entries // 2 - COMMON * (COMMON + 1) // 2))
    counts = np.floor(entries * weights[:kept] / weights[:kept].sum()).astype(int)
    listed = list(chain.from_iterable([w] * c for w, c in zip(words[:kept], counts, strict=True)))
    shown = INTRODUCTION + "".join(f"{word}\n" for word in rng.permutation(listed))
    ids = language.encode(shown)
    decided = np.all(counts[:COMMON] > counts[1 : COMMON + 1])
    if not decided or len(ids) > room:
        raise ValueError(f"a prompt of {length} tokens has no room for common words: ask for more")
    filling = language.haystack(rng, room - len(ids))
    before = chain.from_iterable(language.encode(piece.text) for piece in filling)
    whole = "".join(piece.text for piece in filling) + shown + QUESTION
    return Prompt(whole, [*before, *ids, *question], ", ".join(words[:COMMON]), answer, 0.0)
