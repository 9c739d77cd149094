"""How likely a text is to a model, and how the model goes on with it: what benchmarks ask."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fulmen.trainer.prefill import Reader


class TextScorer:
    """A model with its tokenizer, on one device; texts of any length, one at a time."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, *, end_id: int) -> None:
        """`end_id` ends a document, and stands before a text that has nothing before it."""
        self.reader, self.tokenizer, self.end_id = reader, tokenizer, end_id
        self._last: tuple[list[int], Tensor] | None = None
        """A context and the logits behind it: answers of one token to one question share them."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-probability of a continuation, in nats, and whether greedy decoding gives it.

        The two are encoded as one text, spaces at the end of the context with what follows.
        """
        before = self.encode(context.rstrip()) if context else []
        wanted = self.encode(context + continuation)[len(before) :]
        if not wanted:
            return 0.0, True
        before = before or [self.end_id]
        if len(wanted) == 1 and self._last is not None and self._last[0] == before:
            return _sum_and_greedy(self._last[1], wanted)
        logits, _ = self.reader.read(torch.tensor(before + wanted[:-1]), num_logits=len(wanted))
        self._last = before, logits[:1]
        return _sum_and_greedy(logits, wanted)

    def rolling(self, text: str) -> float:
        """Log-probability of a whole text, in nats; nothing is cut, however long it is."""
        ids = self.encode(text)
        if not ids:
            return 0.0
        return -float(self.reader.losses(torch.tensor([self.end_id, *ids])).double().sum())

    def generate_until(self, context: str, until: Sequence[str], *, max_new_tokens: int) -> str:
        """Greedy continuation up to the first of `until`, which is left out."""
        prompt = self.encode(context) or [self.end_id]
        logits, cache = self.reader.read(torch.tensor(prompt), new_tokens=max_new_tokens)
        next_logits, ids, text = logits[-1], list[int](), ""
        while len(ids) < max_new_tokens:
            next_id = int(next_logits.argmax())
            if next_id == self.end_id:
                break
            ids.append(next_id)
            text = self.tokenizer.decode(ids)
            found = [place for stop in until if stop and (place := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
            if len(ids) < max_new_tokens:
                next_logits = self.reader.step(torch.tensor([next_id]), cache)
        return text


def _sum_and_greedy(logits: Tensor, wanted: Sequence[int]) -> tuple[float, bool]:
    ids = torch.tensor(wanted, device=logits.device)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    total = log_probabilities.gather(1, ids[:, None]).double().sum()
    return float(total), bool((logits.argmax(-1) == ids).all())
