"""What is asked of long texts; without torch, so that a configuration is checked at once."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """A kind of exercise of data/retrieval.py, made harder by others that are never asked for.

    common_words is a kind of its own (common_words.py), which lies in no one place.
    """

    kind: str
    num_distractors: int = 0


TASKS = {
    "niah": Task("needle"),
    "multi_key": Task("needle", num_distractors=8),
    "many_keys": Task("needle", num_distractors=100),
    "multi_value": Task("multi_value"),
    "tracking": Task("tracking"),
    "passage": Task("passage"),
    "common_words": Task("common_words"),
}
"""Retrieval tasks by name; docs/evaluation.md describes them."""


@dataclass
class LongContextConfig:
    """Retrieval from long texts while training, logged as `TASK/LENGTH`."""

    every_steps: int | None = None
    """Steps between evaluations, and one at the end of the run; null = none at all."""
    tasks: list[str] = field(default_factory=lambda: ["niah"])
    """niah, multi_key, many_keys, multi_value, tracking, passage, common_words."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of a text with its question and answer; empty = data.seq_len."""
    depths: int = 5
    """Places of the fact, evenly from the start of the text to its end."""
    samples: int = 2
    """Texts of each length and depth."""
    chunk_tokens: int = 32_768
    """Tokens of a text that are read at a time."""


def check_tasks(tasks: list[str], lengths: list[int], depths: int, samples: int, key: str) -> None:
    """Raise `ValueError` naming `key` and what is under it."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(
            f"{key}tasks={','.join(unknown)}: choose from {', '.join(TASKS)}"
            if unknown
            else f"{key}tasks is empty: choose from {', '.join(TASKS)}"
        )
    for name, value in {"depths": depths, "samples": samples}.items():
        if value < 1:
            raise ValueError(f"{key}{name}={value}: must be at least 1")
    if any(length < 2 for length in lengths):
        raise ValueError(f"{key}lengths: each must be at least 2 tokens")
