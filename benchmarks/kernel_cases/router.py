"""Softmax over the experts, top-k, renormalised weights and counts."""

import torch
from torch import Tensor

from fulmen.kernels.moe import route
from kernel_cases.case import (
    MEMORY_BOUND_LENGTHS,
    Case,
    Cost,
    Expected,
    Inputs,
    Settings,
    own_providers,
    random,
)


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(*MEMORY_BOUND_LENGTHS)]


def case(tokens: int, settings: Settings) -> Case:
    """Reads fp32 logits, writes probabilities, fp32 weights and int64 experts.

    Backward reads the gradients of the first two, the probabilities and the experts, and writes one
    tensor of logits.
    """
    experts, choices = settings.experts, settings.choices

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        logits = random((tokens, experts), device, torch.float32)
        gradients = (
            None,
            random((tokens, choices), device, torch.float32),
            random((tokens, experts), device, torch.float32),
            None,
        )
        return Inputs([logits], (), gradients)

    wide, narrow = tokens * experts * 4, tokens * choices * 4
    return Case(
        op="router",
        label=f"{tokens}",
        tokens=tokens,
        make=make,
        truth=lambda inputs: truth(inputs, choices),
        forward=Cost(2 * wide + 3 * narrow),
        training=Cost(5 * wide + 6 * narrow),
        providers=own_providers("router", lambda logits: tuple(route(logits, choices)), settings),
        tolerance=1e-4,
    )


def truth(inputs: Inputs, choices: int) -> list[Expected]:
    logits = inputs.leaves[0].detach().double().requires_grad_()
    experts = logits.detach().topk(choices, -1).indices
    probabilities = logits.softmax(-1)
    weights = probabilities.gather(1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = experts.flatten().bincount(minlength=logits.shape[1])
    gradients = [x.double() for x in inputs.gradients if x is not None]
    (d_logits,) = torch.autograd.grad((weights, probabilities), logits, gradients)

    def whole(x: Tensor) -> Tensor:
        return x

    outputs = {
        "experts": experts.double(),
        "weights": weights.detach(),
        "probabilities": probabilities.detach(),
        "counts": counts.double(),
    }
    expected = [
        Expected(name, i, False, whole, value) for i, (name, value) in enumerate(outputs.items())
    ]
    return [*expected, Expected("gradient of logits", 0, True, whole, d_logits)]
