"""The unigram model of the training data: the yardstick that any language model must beat."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from fulmen.data.shards import PreparedSplit

MAX_TOKENS = 20_000_000


def unigram_loss(
    train: Iterable[PreparedSplit],
    held_out: Mapping[str, PreparedSplit],
    weights: Mapping[str, float],
) -> float:
    """Cross entropy in nats of held-out labels under the frequencies of the training data's.

    Frequencies are those of labels among at most the first 20 M tokens of each source, plus one per
    token of the vocabulary; sources are mixed by their weights, in training and in held-out data
    alike. What is never to be predicted, such as image tokens and questions, does not count.
    """
    model: npt.NDArray[np.float64] = np.zeros(1)
    data: npt.NDArray[np.float64] = np.zeros(1)
    for split in train:
        share = weights[split.name] / sum(weights.values())
        counts = _count(split) + 1
        model = model + share * counts / counts.sum()
        counts = _count(held_out[split.name])
        data = data + share * counts / counts.sum()
    return float(-(data * np.log(model)).sum())


def _count(split: PreparedSplit) -> npt.NDArray[np.float64]:
    counts, left = np.zeros(split.vocab_size), MAX_TOKENS
    for shard, tokens in enumerate(split.tokens):
        tokens = tokens[:left]
        left -= len(tokens)
        if split.images is not None:
            tokens = tokens[split.images.masks[shard][: len(tokens)] > 0]
        else:  # a document's first token follows none
            starts = split.offsets[shard][:-1]
            tokens = np.delete(tokens, starts[starts < len(tokens)])
        counts += np.bincount(tokens, minlength=split.vocab_size)
    return counts
