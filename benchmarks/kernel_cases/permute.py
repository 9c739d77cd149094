"""Tokens to the order of their experts, and their weighted sum back."""

from typing import Any

import torch
from torch import Tensor

from fulmen.kernels.moe import Permutation, permutation, permute, unpermute
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

SHOWN = 256
"""Tokens at each end whose results are compared."""


def cases(settings: Settings) -> list[Case]:
    lengths = settings.lengths_or(*MEMORY_BOUND_LENGTHS)
    makers = (sort_case, permute_case, unpermute_case)
    return [make(tokens, settings) for make in makers for tokens in lengths]


def random_experts(tokens: int, settings: Settings, device: torch.device) -> Tensor:
    """`[tokens, choices]` int64, each token's experts distinct."""
    logits = torch.randn(tokens, settings.experts, device=device)
    return logits.topk(settings.choices, -1).indices


def sorted_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row of each assignment in a stable order by expert, and rows per expert."""
    order = experts.flatten().argsort(stable=True)
    destinations = torch.empty_like(order)
    destinations[order] = torch.arange(order.numel(), device=order.device)
    counts = experts.flatten().bincount(minlength=num_experts)
    return destinations.view_as(experts), counts


def order_of(constants: tuple[Any, ...]) -> Permutation:
    destinations, counts = constants
    return Permutation(destinations, counts, counts.sum(0, keepdim=True))


def at_ends(x: Tensor) -> Tensor:
    """The first and the last tokens' rows."""
    return torch.cat([x[:SHOWN], x[-SHOWN:]])


def sort_case(tokens: int, settings: Settings) -> Case:
    """Reads the experts, writes the destinations, both int64."""

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        return Inputs([], (random_experts(tokens, settings, device),))

    def truth(inputs: Inputs) -> list[Expected]:
        values = sorted_by_expert(inputs.constants[0], settings.experts)
        names = ("destinations", "counts")
        return [
            Expected(name, i, False, lambda x: x, value.double())
            for i, (name, value) in enumerate(zip(names, values, strict=True))
        ]

    num_bytes = 2 * tokens * settings.choices * 8
    return Case(
        op="permute",
        label=f"sort, {tokens}",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(num_bytes),
        training=Cost(num_bytes),
        providers=own_providers(
            "permute", lambda experts: tuple(permutation(experts, settings.experts)), settings
        ),
        tolerance=0.0,
    )


def permute_case(tokens: int, settings: Settings) -> Case:
    """Forward reads a row per token and writes one per choice; backward the other way round."""
    hidden, choices = settings.hidden, settings.choices

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        order = sorted_by_expert(random_experts(tokens, settings, device), settings.experts)
        x = random((tokens, hidden), device, dtype)
        return Inputs([x], order, (random((tokens * choices, hidden), device, dtype),))

    def truth(inputs: Inputs) -> list[Expected]:
        shown = at_ends(inputs.constants[0])
        x, gradient = at_ends(inputs.leaves[0].detach()), inputs.gradients[0]
        assert gradient is not None
        d_x = gradient[shown].double().sum(1)
        copies = x.double().unsqueeze(1).expand(-1, choices, -1)
        return [
            Expected("rows", 0, False, lambda rows: rows[shown], copies),
            Expected("gradient of x", 0, True, at_ends, d_x),
        ]

    def call(x: Tensor, destinations: Tensor, counts: Tensor) -> Tensor:
        return permute(x, order_of((destinations, counts)))

    num_bytes = tokens * ((1 + choices) * hidden * 2 + choices * 8)
    return Case(
        op="permute",
        label=f"permute, {tokens}",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(num_bytes),
        training=Cost(2 * num_bytes),
        providers=own_providers("permute", call, settings),
    )


def unpermute_case(tokens: int, settings: Settings) -> Case:
    """Forward reads a row per choice and writes one per token; backward also writes one per choice.

    It reads the rows again for the weights' gradient.
    """
    hidden, choices = settings.hidden, settings.choices

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        order = sorted_by_expert(random_experts(tokens, settings, device), settings.experts)
        rows = random((tokens * choices, hidden), device, dtype)
        weights = torch.rand(tokens, choices, device=device)
        return Inputs([rows, weights], order, (random((tokens, hidden), device, dtype),))

    def truth(inputs: Inputs) -> list[Expected]:
        shown = at_ends(inputs.constants[0])
        gradient = inputs.gradients[0]
        assert gradient is not None
        gradient = at_ends(gradient).double().unsqueeze(1)
        rows = inputs.leaves[0].detach()[shown].double()
        weights = at_ends(inputs.leaves[1].detach()).double().unsqueeze(-1)
        return [
            Expected("sums", 0, False, at_ends, (weights * rows).sum(1)),
            Expected("gradient of rows", 0, True, lambda x: x[shown], weights * gradient),
            Expected("gradient of weights", 1, True, at_ends, (rows * gradient).sum(-1)),
        ]

    def call(rows: Tensor, weights: Tensor, destinations: Tensor, counts: Tensor) -> Tensor:
        return unpermute(rows, weights, order_of((destinations, counts)))

    forward = tokens * ((1 + choices) * hidden * 2 + choices * (4 + 8))
    backward = tokens * ((1 + 2 * choices) * hidden * 2 + choices * (4 + 4 + 8))
    return Case(
        op="permute",
        label=f"unpermute, {tokens}",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(forward),
        training=Cost(forward + backward),
        providers=own_providers("permute", call, settings),
    )
