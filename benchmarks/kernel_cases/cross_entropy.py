"""Output head and cross entropy, forward and backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.cross_entropy import linear_cross_entropy
from kernel_cases.case import (
    COMPILED,
    Case,
    Cost,
    Expected,
    Inputs,
    Provider,
    Settings,
    own_providers,
    random,
    rivals,
)

IGNORED = -100
SHOWN = 128
"""Tokens, and rows of the head, at each end whose gradients are compared."""
CHUNK = 512
TOLERANCE = 2e-2
"""Liger adds up the head's gradient in bf16."""


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(8192)]


def whole_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a user writes without a fused op."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def case(tokens: int, settings: Settings) -> Case:
    """2 N H V operations forward, twice that for the gradients, which most compute there."""
    hidden_size, vocabulary = settings.hidden, settings.vocabulary

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        hidden = random((tokens, hidden_size), device, dtype)
        weight = random((vocabulary, hidden_size), device, dtype).mul_(hidden_size**-0.5)
        labels = torch.randint(vocabulary, (tokens,), device=device)
        labels[5::97] = IGNORED
        return Inputs([hidden, weight], (labels,), (torch.tensor(0.5, device=device),))

    def plain() -> Any:
        return whole_logits

    def liger(accumulate: torch.dtype | None) -> Any:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # bias, class weights; ignored label, z-loss, smoothing; reduction; cap, z-loss wanted
        options = (None, None, IGNORED, 0.0, 0.0, "sum", None, False, accumulate)
        return lambda *tensors: LigerFusedLinearCrossEntropyFunction.apply(*tensors, *options)[0]

    def quack() -> Any:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        # Tuning would take minutes.
        return lambda hidden, weight, labels: chunked_linear_cross_entropy(
            hidden, weight, labels, reduction="sum", tuned=False
        )

    flops = 2.0 * tokens * hidden_size * vocabulary
    providers = own_providers("cross_entropy", linear_cross_entropy, settings, compiled=False)
    if settings.rivals:
        providers[COMPILED] = lambda: Provider(torch.compile(whole_logits, dynamic=False))
    return Case(
        op="cross_entropy",
        label=f"{tokens} x {hidden_size} x {vocabulary}",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(flops=flops),
        training=Cost(flops=3 * flops),
        tolerance=TOLERANCE,
        providers=providers
        | rivals(
            settings,
            torch__whole_logits=plain,
            liger_kernel=lambda: liger(None),
            liger_kernel__fp32_sums=lambda: liger(torch.float32),
            quack=quack,
        ),
    )


def truth(inputs: Inputs) -> list[Expected]:
    """The loss of all tokens; the gradients of some tokens and of some rows of the head."""
    hidden, weight = (leaf.detach() for leaf in inputs.leaves)
    (labels,) = inputs.constants
    scale = inputs.gradients[0]
    assert scale is not None
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    exact = weight.double()
    index = labels.clamp(min=0).unsqueeze(1)
    kept = (labels != IGNORED).double()
    parts = []
    for chunk in hidden.split(CHUNK):
        parts.append((chunk.double() @ exact.t()).logsumexp(-1))
    log_sums = torch.cat(parts)
    label_logits = (hidden.double() * exact[index.squeeze(1)]).sum(-1)
    loss = ((log_sums - label_logits) * kept).sum()

    def ends(x: Tensor) -> Tensor:
        return torch.cat([x[:SHOWN], x[-SHOWN:]])

    def d_logits(some: Tensor, rows: Tensor) -> Tensor:
        """Of these tokens with respect to these rows' logits."""
        values = (hidden[some].double() @ exact[rows].t() - log_sums[some].unsqueeze(1)).exp()
        values -= (labels[some].unsqueeze(1) == rows).double()
        return values * kept[some].unsqueeze(1) * scale.double()

    all_tokens = torch.arange(tokens, device=hidden.device)
    all_rows = torch.arange(vocabulary, device=hidden.device)
    # Apart, since the gradients of labels' rows are thousands of times as large.
    is_label = torch.zeros(vocabulary, dtype=torch.bool, device=hidden.device)
    is_label[labels[labels != IGNORED]] = True
    hit, missed = (ends(all_rows[mask]) for mask in (is_label, ~is_label))
    d_hidden = d_logits(ends(all_tokens), all_rows) @ exact
    d_hit, d_missed = (d_logits(all_tokens, x).t() @ hidden.double() for x in (hit, missed))
    return [
        Expected("loss", 0, False, lambda x: x, loss),
        Expected("gradient of hidden", 0, True, ends, d_hidden),
        Expected("gradient of weight, labels", 1, True, lambda x: x[hit], d_hit),
        Expected("gradient of weight, others", 1, True, lambda x: x[missed], d_missed),
    ]
