"""What is asked about images; without torch, so that a configuration is checked at once."""

from collections.abc import Collection
from dataclasses import dataclass, field

READING = "reading"
"""The task of reading held-out documents; others are benchmarks, on files of their own."""
IMAGE_TASKS = (READING, "docvqa", "ai2d")


@dataclass
class ReadingConfig:
    """Questions about held-out images while training: `reading/SOURCE/exact_match` and `.../anls`.

    A question is a held-out document up to one of its answers; greedy decoding has to give that.
    """

    every_steps: int | None = None
    """Steps between evaluations, and one at the end of the run; null = none at all."""
    sources: list[str] = field(default_factory=list)
    """Names of data.sources; empty = all that hold out conversations about images."""
    max_documents: int = 100
    """Of each source, evenly from its held-out ones; each may have several questions."""
    max_answer_tokens: int = 32
    """Questions with a longer answer are left out."""
    examples: int = 8
    """Of each source, kept each time with their images, for the report."""


def check_reading(config: ReadingConfig, sources: Collection[str]) -> None:
    """Raise `ValueError`, naming the key, for values that make no sense for any data."""
    key = "evaluation.reading."
    for name in config.sources:
        if name not in sources:
            raise ValueError(f"{key}sources={name}: data.sources has {', '.join(sources)}")
    for name, value, least in (
        ("every_steps", config.every_steps, 1),
        ("max_documents", config.max_documents, 1),
        ("max_answer_tokens", config.max_answer_tokens, 1),
        ("examples", config.examples, 0),
    ):
        if value is not None and value < least:
            off = ", or null" if name == "every_steps" else ""
            raise ValueError(f"{key}{name}={value}: must be at least {least}{off}")
