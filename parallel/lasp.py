"""Lightning layers on parts of a row: what ranks send each other are states of fixed size.

With `l` the decay a token, `n` the tokens of a part and `p` its rank (arXiv:2501.08313, section
3.2, with decay and documents):

    C_p = sum_j l^(n-1-j) k_j v_j^T     tokens of the document that goes on behind the part
    G_p+1 = C_p + l^n G_p               the second term if that document fills the part
    D_p = sum_i l^(i+1) q_i do_i^T      tokens of the document that comes from before the part
    S_p-1 = D_p + l^n S_p               likewise

`G_p` is the state that enters a part, `S_p` the gradient of the state that leaves it. `C` and `D`
are zero where no document crosses. The powers follow from the boundaries, which every rank knows,
so only states travel, `[heads, head_dim, head_dim]` in fp32, however long the row is:

- LASP+ gathers all `C` (backward all `D`), and each rank sums those that reach it;
- LASP, the baseline, receives `G` from the left neighbour and sends the next one to the right
  (backward `S`, from right to left): each rank waits for all before it.

Both have the same shape, a `StateExchange`: it starts with a rank's own state, work goes on that
does not need the others' (forward the product of the gate, backward the gradient of q), then it
gives the state of the others. Nothing waits on the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.common import accumulation_dtype
from fulmen.kernels.lightning import (
    closing_state,
    combine_states,
    opening_gradient,
    part_backward_kv,
    part_backward_q,
    part_forward,
)
from fulmen.models.layers import Context, decay_slopes
from fulmen.models.lightning import LightningAttention
from fulmen.parallel.collectives import all_gather
from fulmen.parallel.progress import exchange
from fulmen.parallel.prompt import attend_lightning
from fulmen.parallel.seams import fill_seam
from fulmen.parallel.sequence import RowPart


class StateExchange(Protocol):
    """One exchange of states between the ranks of a row, under way once it is made."""

    def receive(self) -> Tensor:
        """The state that comes to this rank's part, zeros if none does; call once."""

    def close(self) -> None:
        """After the work that needs what was received."""


class GatherStates:
    """LASP+: one all-gather."""

    def __init__(
        self, own: Tensor, slopes: Tensor, part: RowPart, group: dist.ProcessGroup, *, reverse: bool
    ) -> None:
        """`own` is what this rank's tokens add; in `reverse` states go to the ranks before."""
        self.slopes, self.part, self.group, self.reverse = slopes, part, group, reverse
        self.gathered = own.new_empty(part.size, *own.shape)
        self.own = own  # lives until it has been read
        row = self.gathered.flatten(0, 1)
        self.work = all_gather(row, own, group=group, async_op=True)

    def receive(self) -> Tensor:
        with exchange(_name("LASP+", self.reverse), self.group):
            self.work.wait()
        part = self.part
        if self.reverse:
            first, end = part.rank + 1, part.last_receiver + 1
        else:
            first, end = part.first_sender, part.rank
        return combine_states(
            self.gathered, self.slopes, first, end, part.tokens, reverse=self.reverse
        )

    def close(self) -> None:
        pass


class PassStates:
    """LASP: one receive and one send a rank."""

    def __init__(
        self, own: Tensor, slopes: Tensor, part: RowPart, group: dist.ProcessGroup, *, reverse: bool
    ) -> None:
        """As in `GatherStates`."""
        self.own, self.group, self.reverse = own, group, reverse
        step = -1 if reverse else 1
        source, self.target = part.rank - step, part.rank + step
        self.has_target = 0 <= self.target < part.size
        self.through = None
        if len(part.lengths) == 1 and part.first_sender < part.rank < part.last_receiver:
            self.through = _decay(slopes, part.tokens).to(own.dtype)
        self.receiving: list[dist.Work] = []
        self.sending: list[dist.Work] = []
        if 0 <= source < part.size:
            self.received = torch.empty_like(own)
            self.receiving = _transfer(dist.irecv, self.received, source, group)
        else:
            self.received = torch.zeros_like(own)
            self._send(own)

    def receive(self) -> Tensor:
        # Named on every rank, also on the first, which receives nothing.
        with exchange(_name("LASP", self.reverse), self.group):
            _wait(self.receiving)
        if self.receiving:
            own = self.own
            if self.through is not None:
                own = torch.addcmul(own, self.received, self.through[:, None, None])
            self._send(own)
        return self.received

    def close(self) -> None:
        _wait(self.sending)

    def _send(self, state: Tensor) -> None:
        if self.has_target:
            self.own = state  # lives until it has been sent
            self.sending = _transfer(dist.isend, state, self.target, self.group)


EXCHANGES: dict[str, type[GatherStates] | type[PassStates]] = {
    "lasp_plus": GatherStates,
    "lasp": PassStates,
}
"""By `parallel.lightning_attention`."""
NOTES = {
    "lasp_plus": "LASP+: one gather of states",
    "lasp": "LASP: states from rank to rank",
}


def _name(variant: str, reverse: bool) -> str:
    return f"{variant} gradients of states" if reverse else f"{variant} states"


def _decay(slopes: Tensor, tokens: int) -> Tensor:
    """What is left of a state after so many tokens, by head, in fp64."""
    return torch.exp(-slopes.double() * tokens)


def _transfer(
    send_or_receive: Callable[..., Any], state: Tensor, peer: int, group: dist.ProcessGroup
) -> list[dist.Work]:
    """To or from the rank `peer` of the group.

    A batch of one: for each pair of ranks that send without a batch, NCCL makes a communicator.
    """
    peer = dist.get_global_rank(group, peer)
    return dist.batch_isend_irecv([dist.P2POp(send_or_receive, state, peer, group)])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def spread_lightning(layer: LightningAttention, group: dist.ProcessGroup, variant: str) -> None:
    """Let a layer work on parts of rows that the ranks of `group` share."""
    fill_seam(layer, "begin", partial(_begin, layer, group, variant), NOTES[variant])
    fill_seam(layer, "attend", partial(_attend, layer, group), NOTES[variant])


def _begin(
    layer: LightningAttention,
    group: dist.ProcessGroup,
    variant: str,
    k: Tensor,
    v: Tensor,
    context: Context,
) -> "PartAttention | None":
    if context.cache is not None:
        return None
    slopes = decay_slopes(layer.num_heads, layer.layer, layer.num_layers, k.device)
    assert isinstance(context.row_part, RowPart)
    return PartAttention(k, v, slopes, context.row_part, context.cu_seqlens, group, variant)


def _attend(
    layer: LightningAttention,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    begun: "PartAttention | None",
) -> Tensor:
    if begun is None:
        return attend_lightning(layer, group, q, k, v, context)
    return begun.finish(q, k, v)


class PartAttention:
    """Lightning attention on `[1, tokens, heads, head_dim]`, this rank's part of a row.

    Made from k and v, it has sent this part's state off; `finish` gives the output.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        part: RowPart,
        cu_seqlens: Tensor | None,
        group: dist.ProcessGroup,
        variant: str,
    ) -> None:
        """`cu_seqlens` are the boundaries inside the part."""
        self.slopes, self.part, self.cu_seqlens = slopes, part, cu_seqlens
        self.exchange = partial(EXCHANGES[variant], slopes=slopes, part=part, group=group)
        with torch.no_grad():
            if part.last_receiver > part.rank:
                last, end = part.tokens - part.lengths[-1], part.tokens
                own = closing_state(_tokens(k, last, end), _tokens(v, last, end), slopes)
            else:
                own = _no_state(k)
            self.entering: StateExchange = self.exchange(own, reverse=False)

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Call once, with the k and v that it was made from."""
        return _Attend.apply(q, k, v, self)


class _Attend(torch.autograd.Function):
    """The passes of a part, around the exchange of its states and of their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: PartAttention) -> Tensor:
        slopes, bounds = attention.slopes, attention.cu_seqlens
        entering = attention.entering.receive()
        out, kept = part_forward(q, k, v, slopes, bounds, entering)
        attention.entering.close()
        ctx.save_for_backward(q, k, v, slopes, bounds, entering, *kept)
        ctx.part, ctx.exchange = attention.part, attention.exchange
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = gradients
        q, k, v, slopes, bounds, entering, *kept = ctx.saved_tensors
        part = ctx.part
        if part.first_sender < part.rank:
            first = part.lengths[0]
            own = opening_gradient(_tokens(q, 0, first), _tokens(d_out, 0, first), slopes)
        else:
            own = _no_state(q)
        leaving = ctx.exchange(own, reverse=True)
        dq = part_backward_q(d_out, k, v, slopes, bounds, entering, kept)
        dk, dv = part_backward_kv(d_out, q, k, v, slopes, bounds, leaving.receive(), kept)
        leaving.close()
        return dq, dk, dv, None


def _tokens(x: Tensor, first: int, end: int) -> Tensor:
    """Some tokens of a part; no view is made for all of them."""
    return x if end - first == x.shape[1] else x[:, first:end]


def _no_state(x: Tensor) -> Tensor:
    _, _, heads, head_dim = x.shape
    return x.new_zeros(heads, head_dim, head_dim, dtype=accumulation_dtype(x))
