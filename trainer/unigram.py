"""The unigram model of the training data: the yardstick that any language model must beat."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fulmen.data.config import SourceConfig
from fulmen.data.shards import PreparedSplit

MAX_TOKENS = 20_000_000


def unigram_loss(
    sources: Mapping[str, SourceConfig], held_out: Mapping[str, PreparedSplit], vocab_size: int
) -> float:
    """Cross entropy in nats of held-out tokens under the training data's token frequencies.

    Frequencies are those of at most the first 20 M tokens of each source, plus one per token of
    the vocabulary; sources are mixed by their weights, in training and in held-out data alike.
    """
    total_weight = sum(source.weight for source in sources.values())
    train, valid = np.zeros(vocab_size), np.zeros(vocab_size)
    for name, source in sources.items():
        share = source.weight / total_weight
        counts = _count(PreparedSplit(source.path, "train", name=name, vocab_size=vocab_size)) + 1
        train += share * counts / counts.sum()
        counts = _count(held_out[name])
        valid += share * counts / counts.sum()
    return float(-(valid * np.log(train)).sum())


def _count(split: PreparedSplit) -> npt.NDArray[np.float64]:
    counts, left = np.zeros(split.vocab_size), MAX_TOKENS
    for tokens in split.tokens:
        counts += np.bincount(tokens[:left], minlength=split.vocab_size)
        left -= len(tokens[:left])
    return counts
