"""Text from a checkpoint: recurrent states in lightning layers, a KV cache in softmax layers."""

from collections.abc import Collection

import torch
from torch import Tensor

from fulmen.models.text import TextModel
from fulmen.trainer.prefill import CHUNK_TOKENS, Reader
from fulmen.trainer.prompt_images import PromptImages


@torch.inference_mode()
def generate(
    model: TextModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    stop_ids: Collection[int] = (),
    chunk_tokens: int = CHUNK_TOKENS,
    images: PromptImages | None = None,
) -> list[int]:
    """Continue `prompt`; returns the new token ids, one of `stop_ids` excluded.

    `temperature` 0 takes the most likely token each time; `top_k` keeps only the k most likely.
    The prompt is read `chunk_tokens` at a time. A new token costs the same however long the text
    is, but for the softmax layers' KV cache.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens: give at least one character of text")
    reader = Reader(model, chunk_tokens=chunk_tokens)
    logits, cache = reader.read(torch.tensor(prompt), new_tokens=max_new_tokens, images=images)
    next_logits, new_ids = logits[-1], list[int]()
    while len(new_ids) < max_new_tokens:
        next_id = _sample(next_logits.float(), temperature, top_k, generator)
        if next_id in stop_ids:
            break
        new_ids.append(next_id)
        if len(new_ids) < max_new_tokens:
            next_logits = reader.step(torch.tensor([next_id]), cache)
    return new_ids


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.numel()))
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    # In fp64 no temperature is 0, and behind the largest logit no quotient is infinite.
    scores = (logits - logits.max()).double() / temperature
    # On the CPU, so that a seed gives the same text on every device.
    probabilities = torch.softmax(scores, dim=0, dtype=torch.float32).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
