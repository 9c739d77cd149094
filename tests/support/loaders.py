"""Loaders for tests: small rows, no thread beside the test."""

from typing import Any

from fulmen.data.config import SourceConfig
from fulmen.data.loader import PackedLoader, StepBatch
from fulmen.data.mixture import Shares


def open_loader(sources: dict[str, SourceConfig], **options: Any) -> PackedLoader:
    """By the sources' weights, whatever the documents' lengths."""
    weights = {name: source.weight for name, source in sources.items()}
    settings = {"seed": 7, "shares": lambda tokens: Shares(weights, None), "prefetch_steps": 0}
    return PackedLoader(sources, **(settings | options))


def take(loader: PackedLoader, count: int) -> list[StepBatch]:
    """Its next steps; it is closed then."""
    steps = [next(loader) for _ in range(count)]
    loader.close()
    return steps
