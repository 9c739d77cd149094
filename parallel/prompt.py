"""A text that goes through the model in pieces, over the ranks of a group; without gradients.

The tokens of a piece are divided among the ranks, in contiguous parts. What a cache keeps of them:

- lightning layers: the state after the piece, on every rank. It is summed from all parts' states,
  gathered as in LASP+, and the state before the piece;
- softmax layers: each rank keeps the keys and values of its own parts, so that this memory falls
  with the number of ranks. Keys stay, queries travel: every rank attends for the whole piece to the
  keys that it holds, and sends each rank its queries' outputs and log-sum-exps, to be merged. What
  is sent does not grow with the text, and all ranks have as much to do.

A shared piece lies on all ranks alike: the last tokens, whose logits all of them want, and new
tokens in decoding. One rank keeps its keys, in turn.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.attention import Merged
from fulmen.kernels.lightning import closing_state, combine_states, part_forward
from fulmen.models.layers import Cache, Context, KeyValues, decay_slopes
from fulmen.models.lightning import LightningAttention
from fulmen.parallel.collectives import all_gather
from fulmen.parallel.progress import exchange


@dataclass(frozen=True)
class PromptPart:
    """Where one rank's tokens lie in a piece; `Context.row_part` beside a cache."""

    rank: int
    size: int
    is_shared: bool
    """Whether every rank has the same tokens, or each the next ones."""


@torch.no_grad()
def attend_lightning(
    layer: LightningAttention,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
) -> Tensor:
    """`LightningAttention.attend` for one rank's part, `[1, tokens, heads, head_dim]`."""
    part, cache = _known(context)
    if part.is_shared:
        return LightningAttention.attend(layer, q, k, v, context)
    slopes = decay_slopes(layer.num_heads, layer.layer, layer.num_layers, q.device)
    own = closing_state(k, v, slopes)
    states = own.new_empty(part.size, *own.shape)
    with exchange("states of a prompt", group):
        all_gather(states.flatten(0, 1), own, group=group)
    tokens = k.shape[1]
    entering = combine_states(states, slopes, 0, part.rank, tokens, reverse=False)
    leaving = combine_states(states, slopes, 0, part.size, tokens, reverse=False)
    before = cache.states.get(layer.layer)
    if before is not None:
        rate = -slopes.double()[:, None, None] * tokens
        entering += before[0] * torch.exp(rate * part.rank).to(before.dtype)
        leaving += before[0] * torch.exp(rate * part.size).to(before.dtype)
    cache.states[layer.layer] = leaving[None]
    return part_forward(q, k, v, slopes, None, entering)[0]


@torch.no_grad()
def attend_softmax(
    layer: int, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, context: Context
) -> Tensor:
    """`SoftmaxAttention.attend` of layer `layer` for one rank's part."""
    part, cache = _known(context)
    attend = _attend_shared if part.is_shared else _attend_spread
    merged = Merged(q[0])
    for out_and_lse in attend(layer, group, q[0], k, v, part, cache):
        merged.merge(out_and_lse[..., :-1], out_and_lse[..., -1].t())
    return merged.out.to(q.dtype)[None]


def _attend_spread(
    layer: int,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: PromptPart,
    cache: Cache,
) -> Tensor:
    tokens, held = q.shape[0], cache.of_layer(layer)
    queries = q.new_empty(part.size * tokens, *q.shape[1:])
    with exchange("queries of a prompt", group):
        all_gather(queries, q.contiguous(), group=group)
    merged = Merged(queries)
    _add_held(merged, held)
    held.append(k, v)
    end = (part.rank + 1) * tokens
    merged.add_causal(k[0], v[0], slice(end - tokens, end))
    if part.rank + 1 < part.size:
        merged.add(k[0], v[0], slice(end, None))
    sent = _joined(merged)
    received = torch.empty_like(sent)
    with exchange("attention of a prompt", group):
        dist.all_to_all_single(received, sent, group=group)
    return received.unflatten(0, (part.size, tokens))


def _attend_shared(
    layer: int,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: PromptPart,
    cache: Cache,
) -> Tensor:
    held, merged = cache.of_layer(layer), Merged(q)
    _add_held(merged, held)
    if cache.num_tokens % part.size == part.rank:
        held.append(k, v)
        merged.add_causal(k[0], v[0])
    own = _joined(merged)
    gathered = own.new_empty(part.size, *own.shape)
    with exchange("attention of a prompt", group):
        all_gather(gathered.flatten(0, 1), own, group=group)
    return gathered


def _add_held(merged: Merged, held: KeyValues) -> None:
    """All keys that this rank keeps lie before the queries."""
    if held.num_tokens:
        k, v = held.views()
        merged.add(k[0], v[0])


def _joined(merged: Merged) -> Tensor:
    """`[tokens, heads, head_dim + 1]`: outputs and, in the last place, log-sum-exps."""
    return torch.cat([merged.out, merged.lse.t()[..., None]], dim=-1)


def _known(context: Context) -> tuple[PromptPart, Cache]:
    assert isinstance(context.row_part, PromptPart)
    assert context.cache is not None
    return context.row_part, context.cache
