"""Top-k routing and the capacity limit: the public ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.kernels.common import why_not_triton
from fulmen.kernels.moe.permute import permutation
from fulmen.kernels.moe.reference import reference_route
from fulmen.kernels.registry import choose

MOST_EXPERTS = 256
MOST_CHOICES = 8


class Routing(NamedTuple):
    """Where each token goes. An assignment is one (token, choice) pair."""

    experts: Tensor
    """`[tokens, k]` int64 expert of each assignment; `num_experts` where it is dropped."""
    weights: Tensor
    """`[tokens, k]` fp32 gate weights; they sum to 1 per token before any drop, 0 for padding."""
    probabilities: Tensor
    """`[tokens, num_experts]` fp32 softmax over all experts."""
    counts: Tensor
    """`[num_experts]` int64 assignments the router asked for: without padding, before any drop."""


def route(logits: Tensor, num_experts_per_token: int, *, num_tokens: int | None = None) -> Routing:
    """Softmax over the experts in fp32, the k largest, renormalised to sum to 1 per token.

    Equals the softmax over the k largest logits (arXiv:2501.08313, equation 1).

    Args:
        logits: `[tokens, num_experts]`. The largest comes first; of equal ones, the lower expert.
        num_tokens: tokens from here on are padding: they go to no expert, with weight 0.
    """
    if logits.dim() != 2 or not 1 <= num_experts_per_token <= logits.shape[1]:
        raise ValueError(
            "route: logits must be [tokens, num_experts] with at least as many experts as choices, "
            f"got {tuple(logits.shape)} and {num_experts_per_token} choices"
        )
    reason = why_not_triton(logits)
    if not reason and (logits.shape[1] > MOST_EXPERTS or num_experts_per_token > MOST_CHOICES):
        reason = f"needs at most {MOST_EXPERTS} experts and {MOST_CHOICES} choices"
    if choose("router", ("triton", reason), ("torch", "")) == "triton":
        from fulmen.kernels.moe.triton_router import triton_route

        return Routing(*triton_route(logits, num_experts_per_token, num_tokens))
    return Routing(*reference_route(logits, num_experts_per_token, num_tokens))


def drop_over_capacity(routing: Routing, num_experts: int, capacity: int | Tensor) -> Routing:
    """Keep at most `capacity` assignments per expert, earlier choices first, then earlier tokens.

    `capacity` is one number, or `[num_experts]` int64.

    All first choices are served before any second choice (GShard's order, arXiv:2006.16668,
    algorithm 1); the paper does not say which it uses. A dropped assignment adds nothing, and the
    weights of a token's other choices stay as they are, as do `counts`.
    """
    tokens, k = routing.experts.shape
    by_priority = routing.experts.t().reshape(-1, 1)  # all first choices, then all second ones
    queue = permutation(by_priority, num_experts)
    first_of_expert = torch.cat([queue.counts.new_zeros(1), queue.counts.cumsum(0)])
    rank = queue.destinations - first_of_expert[by_priority]
    if isinstance(capacity, Tensor):
        capacity = torch.cat([capacity, capacity.new_zeros(1)])[by_priority]
    kept = torch.where(rank < capacity, by_priority, num_experts)
    return routing._replace(experts=kept.view(k, tokens).t())
