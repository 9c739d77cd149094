"""`part.py` on Triton: the launches for a row that goes on before and behind what is here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fulmen.kernels.common import num_processors
from fulmen.kernels.lightning.launch import (
    CARRY_BLOCK,
    PROCESSORS_WITHOUT_GPU,
    SHORTEST_PIECE,
    Launcher,
    addressable,
    choose_tile,
    find_documents,
    make_plan,
    run,
)
from fulmen.kernels.lightning.triton_scan import combine_kernel

CLOSING_WAVES = 4
"""Programs over multiprocessors for a closing state. Fast heads are done after a few chunks; with
several pieces a head, other multiprocessors take up what slow ones have to read."""
LONGEST_WHOLE = 64
"""Chunks up to which a closing state is read in one piece: the launch that sums pieces would take
longer than they save."""


def closing_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool, piece_tokens: int = 0
) -> Tensor:
    """Pieces of the row run side by side and are summed with their decays."""
    plan = make_plan(k, piece_tokens or _closing_piece(k))
    launcher = Launcher(plan, slopes, reverse=reverse)
    return launcher.closing_state(addressable(k), addressable(v))


def _closing_piece(k: Tensor) -> int:
    """Tokens of a piece."""
    _, tokens, heads, head_dim = k.shape
    tile = choose_tile(k.dtype, head_dim)
    chunks, pieces = -(-tokens // tile.block_tokens), 1
    if chunks > LONGEST_WHOLE:
        processors = num_processors(k.device, PROCESSORS_WITHOUT_GPU)
        most = CLOSING_WAVES * processors // (heads * (head_dim // tile.block_values))
        pieces = max(1, min(most, chunks // SHORTEST_PIECE))
    return -(-chunks // pieces) * tile.block_tokens


def combine_states(
    gathered: Tensor, slopes: Tensor, first: int, end: int, tokens: int, *, reverse: bool
) -> Tensor:
    """In one launch; `gathered` is contiguous."""
    _, heads, head_dim, _ = gathered.shape
    combined = torch.empty(gathered.shape[1:], dtype=torch.float32, device=gathered.device)
    size = head_dim**2
    block = min(size, CARRY_BLOCK)
    run(
        combine_kernel,
        heads * (size // block),
        gathered,
        slopes,
        combined,
        first,
        end,
        tokens,
        heads,
        STATE_SIZE=size,
        BLOCK=block,
        REVERSE=reverse,
        num_warps=4,
    )
    return combined


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    entering: Tensor,
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and (states at the cuts, documents of a part that has several)."""
    plan = make_plan(q, piece_tokens)
    words = None if cu_seqlens is None else find_documents(plan, cu_seqlens)
    launcher = Launcher(plan, slopes, words)
    q, k, v = map(addressable, (q, k, v))
    cuts = launcher.cut_states(k, v, entering)
    out = launcher.scan(
        q, k, v, outer=entering, cuts=cuts, leaving=None, transposed=False, fills_cuts=True
    )
    return out, (cuts,) if words is None else (cuts, words)


def backward_q(
    d_out: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    entering: Tensor,
    kept: Sequence[Tensor],
    *,
    piece_tokens: int = 0,
) -> Tensor:
    """The scan of d_out over v and k, whose states are those of the output's, transposed."""
    cuts, *words = kept
    launcher = Launcher(make_plan(k, piece_tokens), slopes, *words)
    d_out, k, v = map(addressable, (d_out, k, v))
    return launcher.scan(d_out, v, k, outer=entering, cuts=cuts, leaving=None, transposed=True)


def backward_kv(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    d_leaving: Tensor,
    kept: Sequence[Tensor],
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """dk and dv scan one sequence of states, of which dk takes the transposes."""
    plan = make_plan(q, piece_tokens)
    launcher = Launcher(plan, slopes, *kept[1:], reverse=True)
    d_out, q, k, v = map(addressable, (d_out, q, k, v))
    cuts = launcher.cut_states(q, d_out, d_leaving)
    dk = launcher.scan(
        v, d_out, q, outer=d_leaving, cuts=cuts, leaving=None, transposed=True, fills_cuts=True
    )
    dv = launcher.scan(k, q, d_out, outer=d_leaving, cuts=cuts, leaving=None, transposed=False)
    return dk, dv
