"""`part.py` on Triton: the launches for a row that goes on before and behind what is here."""

import dataclasses

from torch import Tensor

from fulmen.kernels.common import num_processors
from fulmen.kernels.lightning.launch import (
    PROCESSORS_WITHOUT_GPU,
    SHORTEST_PIECE,
    Launcher,
    addressable,
    make_plan,
)

CLOSING_WAVES = 4
"""Programs over multiprocessors for a closing state. Fast heads are done after a few chunks; with
several pieces a head, other multiprocessors take up what slow ones have to read."""


def closing_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool, piece_tokens: int = 0
) -> Tensor:
    """Pieces of the row run side by side and are summed with their decays."""
    plan = make_plan(k, piece_tokens)
    if not piece_tokens:
        processors = num_processors(k.device, PROCESSORS_WITHOUT_GPU)
        most = CLOSING_WAVES * processors // (plan.batch * plan.heads * plan.slices)
        pieces = max(1, min(most, plan.chunks // SHORTEST_PIECE))
        plan = dataclasses.replace(plan, piece_chunks=-(-plan.chunks // pieces), in_turn=False)
    launcher = Launcher(plan, slopes, None, reverse=reverse)
    return launcher.closing_state(addressable(k), addressable(v))[0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output, and the states at the cuts."""
    launcher = Launcher(make_plan(q, piece_tokens), slopes, cu_seqlens)
    q, k, v = map(addressable, (q, k, v))
    cuts = launcher.cut_states(k, v, entering)
    out = launcher.scan(
        q, k, v, outer=entering, cuts=cuts, leaving=None, transposed=False, fills_cuts=True
    )
    return out, cuts


def backward_q(
    d_out: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    cuts: Tensor,
    *,
    piece_tokens: int = 0,
) -> Tensor:
    """The scan of d_out over v and k, whose states are those of the output's, transposed."""
    launcher = Launcher(make_plan(k, piece_tokens), slopes, cu_seqlens)
    d_out, k, v = map(addressable, (d_out, k, v))
    return launcher.scan(d_out, v, k, outer=entering, cuts=cuts, leaving=None, transposed=True)


def backward_kv(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    d_leaving: Tensor,
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """dk and dv scan one sequence of states, of which dk takes the transposes."""
    plan = make_plan(q, piece_tokens)
    launcher = Launcher(plan, slopes, cu_seqlens, reverse=True)
    d_out, q, k, v = map(addressable, (d_out, q, k, v))
    cuts = launcher.cut_states(q, d_out, d_leaving)
    dk = launcher.scan(
        v, d_out, q, outer=d_leaving, cuts=cuts, leaving=None, transposed=True, fills_cuts=True
    )
    dv = launcher.scan(k, q, d_out, outer=d_leaving, cuts=cuts, leaving=None, transposed=False)
    return dk, dv
