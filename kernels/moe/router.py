"""Top-k routing and the capacity limit."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where each token goes. An assignment is one (token, choice) pair."""

    experts: Tensor
    """`[tokens, k]` int64 expert of each assignment; `num_experts` where it is dropped."""
    weights: Tensor
    """`[tokens, k]` fp32 gate weights; they sum to 1 per token before any drop."""
    probabilities: Tensor
    """`[tokens, num_experts]` fp32 softmax over all experts."""


def route(logits: Tensor, num_experts_per_token: int) -> Routing:
    """Softmax over the experts in fp32, the k largest, renormalised to sum to 1 per token.

    `logits` is `[tokens, num_experts]`. Equals the softmax over the k largest logits
    (arXiv:2501.08313, equation 1).
    """
    probabilities = torch.softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    weights, experts = probabilities.topk(num_experts_per_token, dim=-1)
    return Routing(experts, weights / weights.sum(-1, keepdim=True), probabilities)


def drop_over_capacity(routing: Routing, num_experts: int, capacity: int) -> Routing:
    """Keep at most `capacity` assignments per expert, earlier choices first, then earlier tokens.

    All first choices are served before any second choice (GShard's order, arXiv:2006.16668,
    algorithm 1); the paper does not say which it uses. A dropped assignment adds nothing, and the
    weights of a token's other choices stay as they are.
    """
    tokens, k = routing.experts.shape
    by_priority = routing.experts.t().reshape(-1)  # all first choices, then all second ones
    order = by_priority.argsort(stable=True)
    counts = by_priority.new_zeros(num_experts + 1)
    counts.scatter_add_(0, by_priority, torch.ones_like(by_priority))
    first_of_expert = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = (
        torch.arange(tokens * k, device=order.device) - first_of_expert[by_priority[order]]
    )
    kept = torch.where(rank < capacity, by_priority, num_experts)
    return routing._replace(experts=kept.view(k, tokens).t())
