"""Pairs of answers as packed rows, and how likely they are to the model that a run starts from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fulmen.models.text import LossOutput, TextModel


@dataclass(frozen=True)
class Pair:
    """A question with a better and a worse answer, as token ids."""

    key: str
    prompt: tuple[int, ...]
    """At least one token."""
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of both documents; the last token of an answer is predicted, not read."""
        return 2 * (len(self.prompt) - 1) + len(self.chosen) + len(self.rejected)


def fill_rows(pairs: Sequence[Pair], row_tokens: int) -> Iterator[list[Pair]]:
    """Pairs in their order, as many a row as fit; both documents of a pair share a row."""
    row: list[Pair] = []
    left = row_tokens
    for pair in pairs:
        if not (pair.prompt and pair.chosen and pair.rejected) or pair.num_tokens > row_tokens:
            raise ValueError(
                f"pair {pair.key}: prompt and answers must not be empty, and have "
                f"{pair.num_tokens} tokens of a row's {row_tokens}"
            )
        if pair.num_tokens > left:
            yield row
            row, left = [], row_tokens
        row.append(pair)
        left -= pair.num_tokens
    if row:
        yield row


def pack_pairs(pairs: Sequence[Pair], row_tokens: int, device: torch.device) -> dict[str, Any]:
    """Arguments of `TextModel.forward`: documents chosen, rejected, chosen, ..., then padding.

    Labels are those of the answers.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            text = (*pair.prompt, *answer)
            ids += text[:-1]
            labels += [-100] * (len(pair.prompt) - 1) + list(answer)
            lengths.append(len(text) - 1)
    num_tokens = len(ids)
    padding = row_tokens - num_tokens
    if padding:
        lengths.append(padding)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids + [0] * padding], device=device),
        "labels": torch.tensor([labels + [-100] * padding], device=device),
        "cu_seqlens": bounds.to(device),
        "document_lengths": lengths,
        "num_tokens": num_tokens,
    }


def pair_log_probabilities(
    model: TextModel, pairs: Sequence[Pair], row_tokens: int, device: torch.device
) -> tuple[Tensor, LossOutput]:
    """`[pairs, 2]` log-probabilities of chosen and rejected answers of one row, and its losses."""
    output = model(**pack_pairs(pairs, row_tokens, device), per_document=True)
    assert isinstance(output, LossOutput)
    return -output.loss_sum[: 2 * len(pairs)].view(-1, 2), output


@torch.no_grad()
def reference_log_probabilities(
    model: TextModel, pairs: Sequence[Pair], *, row_tokens: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Key of each pair -> log-probabilities of its chosen and its rejected answer.

    Of the weights that a preference stage starts from, to be computed once and stored. All ranks
    of a model that is spread call it with the same pairs.
    """
    was_training = model.training
    model.eval()  # no capacity of experts: an answer's value must not depend on its neighbours
    found: dict[str, tuple[float, float]] = {}
    for row in fill_rows(pairs, row_tokens):
        values, _ = pair_log_probabilities(model, row, row_tokens, device)
        for pair, (chosen, rejected) in zip(row, values.tolist(), strict=True):
            found[pair.key] = (chosen, rejected)
    model.train(was_training)
    return found
