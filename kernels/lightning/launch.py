"""Lightning attention on Triton: the plan of pieces, the launches, torch ops with autograd.

`triton_lightning_attention` is what a caller needs. The kernels and their cost are described in
triton_scan.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fulmen.kernels.common import DTYPES, num_processors
from fulmen.kernels.lightning.op import HEAD_DIMS
from fulmen.kernels.lightning.triton_documents import documents_kernel
from fulmen.kernels.lightning.triton_scan import carry_kernel, local_state_kernel, scan_kernel

SHORTEST_PIECE = 8
"""Chunks. A piece's state costs as much traffic as two chunks' k and v."""
CUTTING_COST = 1.2
"""Time of a cut row over that of a whole one, at equal use of the chip: phases 1 and 2."""
MOST_WAVES = 4
"""Programs over multiprocessors, at most, if rows are cut. A multiprocessor holds one program."""
WINDOW_TOKENS = 32768
"""Length of a piece of a long row, about. Programs drift apart along a row, until the slices of a
head no longer find each other's tiles in L2; a new launch brings them together."""
PROCESSORS_WITHOUT_GPU = 8
"""The interpreter's chip."""
CARRY_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """How a scan is cut for one program. The widths must divide the head dimension."""

    block_tokens: int
    block_values: int
    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads."""


def choose_tile(dtype: torch.dtype, head_dim: int) -> Tile:
    """The table for H100 and H200 (one chip but for its memory); bf16 at head_dim 128 was timed."""
    if dtype == torch.float32:
        # Exact fp32 products have no tensor cores: small tiles, for registers and compile time.
        return Tile(16, 16, 4, 1)
    if head_dim <= 64:
        return Tile(64, head_dim, 4, 3)
    if head_dim == 128:
        return Tile(64, 64, 4, 4)
    return Tile(64, 32, 4, 2)


def choose_num_pieces(chunks: int, programs: int, num_processors: int) -> int:
    """Pieces of a row of `chunks` that run side by side; `programs` would run were it left whole.

    The number with which the waves of programs are soonest done; the fewest pieces, if several.
    """
    best, least = 1, float(-(-programs // num_processors))
    most = min(MOST_WAVES * num_processors // max(1, programs), chunks // SHORTEST_PIECE)
    for pieces in range(2, most + 1):
        time = CUTTING_COST * -(-programs * pieces // num_processors) / pieces
        if time < least - 1e-9:
            best, least = pieces, time
    return best


@dataclass(frozen=True)
class Plan:
    """Sizes of all launches of one call; from shapes alone, so that fake tensors can make one."""

    tile: Tile
    batch: int
    tokens: int
    heads: int
    head_dim: int
    chunks: int
    """Of one row."""
    piece_chunks: int
    in_turn: bool
    """Pieces run one after the other, each from the state that the last one left; phases 1 and 2
    fall away."""

    @property
    def pieces(self) -> int:
        return -(-self.chunks // self.piece_chunks)

    @property
    def slices(self) -> int:
        return self.head_dim // self.tile.block_values

    @property
    def cuts_shape(self) -> tuple[int, ...]:
        return self.batch * (self.pieces - 1), self.heads, self.head_dim, self.head_dim

    @property
    def words_shape(self) -> tuple[int, int]:
        """For an entry before the first and one behind the last chunk, and an even number: kernels
        are compiled for addresses at multiples of 16 bytes."""
        return 2, (self.chunks + 3) // 2 * 2

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.head_dim, self.head_dim


def make_plan(q: Tensor, piece_tokens: int) -> Plan:
    batch, tokens, heads, head_dim = q.shape
    tile = choose_tile(q.dtype, head_dim)
    chunks = -(-tokens // tile.block_tokens)
    if piece_tokens:
        piece_chunks, in_turn = piece_tokens // tile.block_tokens, False
    else:
        programs = batch * heads * (head_dim // tile.block_values)
        pieces = choose_num_pieces(
            chunks, programs, num_processors(q.device, PROCESSORS_WITHOUT_GPU)
        )
        in_turn = pieces == 1
        windows = (chunks * tile.block_tokens + WINDOW_TOKENS // 2) // WINDOW_TOKENS
        piece_chunks = -(-chunks // max(pieces, windows, 1))
    piece_chunks = min(chunks, piece_chunks)
    return Plan(tile, batch, tokens, heads, head_dim, chunks, piece_chunks, in_turn)


def find_documents(plan: Plan, cu_seqlens: Tensor) -> Tensor:
    """What all passes must know of a packed row's documents: words, see triton_documents.py."""
    words = torch.empty(plan.words_shape, dtype=torch.int64, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    run(
        documents_kernel,
        words.numel(),
        cu_seqlens,
        words,
        sequences,
        sequences.bit_length(),
        plan.tokens,
        BLOCK_TOKENS=plan.tile.block_tokens,
        num_warps=1,
    )
    return words


class Launcher:
    """The launches of one call: what all of them share, written once."""

    def __init__(
        self, plan: Plan, slopes: Tensor, words: Tensor | None = None, *, reverse: bool = False
    ) -> None:
        """`words` of `find_documents`, for a packed row."""
        self.plan, self.slopes, self.reverse = plan, slopes, reverse
        self.packed = words is not None
        self.words = slopes if words is None else words[int(reverse)]  # slopes: never read

    def sizes(self) -> dict[str, Any]:
        plan, tile = self.plan, self.plan.tile
        return {
            "tokens": plan.tokens,
            "pieces": plan.pieces,
            "piece_chunks": plan.piece_chunks,
            "heads": plan.heads,
            "HEAD_DIM": plan.head_dim,
            "BLOCK_TOKENS": tile.block_tokens,
            "BLOCK_VALUES": tile.block_values,
            "PACKED": self.packed,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def cut_states(self, b: Tensor, c: Tensor, outer: Tensor | None) -> Tensor:
        """Phases 1 and 2: the states at the cuts; `outer` are those that enter the rows."""
        cuts = self.plan.pieces - 1
        if self.plan.in_turn or cuts == 0:
            return torch.empty(self.plan.cuts_shape, dtype=torch.float32, device=b.device)
        return self._states(b, c, outer, cuts)

    def closing_state(self, b: Tensor, c: Tensor) -> Tensor:
        """`[heads, head_dim, head_dim]`: what one row that is not packed leaves behind."""
        assert not self.packed
        assert self.plan.batch == 1
        return self._states(b, c, None, self.plan.pieces)[0 if self.reverse else -1]

    def _states(self, b: Tensor, c: Tensor, outer: Tensor | None, places: int) -> Tensor:
        """At a row's cuts, or, for as many `places` as pieces, at the end of each."""
        plan = self.plan
        shape = (plan.batch * places, *plan.cuts_shape[1:])
        states = torch.empty(shape, dtype=torch.float32, device=b.device)
        decays = torch.empty(shape[:2], dtype=torch.float32, device=b.device)
        run(
            local_state_kernel,
            self.num_programs(plan.pieces),
            b,
            c,
            _strides(b),
            _strides(c),
            self.slopes,
            states if outer is None else outer,
            states,
            decays,
            self.words,
            first_piece=0,
            launched=plan.pieces,
            HAS_OUTER=outer is not None,
            TO_EDGE=places == plan.pieces,
            REVERSE=self.reverse,
            **self.sizes(),
        )
        if places == 1:
            return states
        size = plan.head_dim**2
        block = min(size, CARRY_BLOCK)
        run(
            carry_kernel,
            plan.batch * plan.heads * (size // block),
            states,
            decays,
            places,
            plan.heads,
            STATE_SIZE=size,
            BLOCK=block,
            REVERSE=self.reverse,
            num_warps=4,
        )
        return states

    def scan(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        outer: Tensor | None,
        cuts: Tensor,
        leaving: Tensor | None,
        transposed: bool,
        fills_cuts: bool = False,
    ) -> Tensor:
        """Phase 3; `leaving`, if given, receives the states that leave the rows.

        `fills_cuts`: where pieces run in turn, nobody has filled `cuts` yet.
        """
        pieces = range(self.plan.pieces)
        in_turn = self.plan.in_turn or len(pieces) == 1
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        launches = [[0, len(pieces)]]
        if in_turn:
            launches = [[piece, 1] for piece in (reversed(pieces) if self.reverse else pieces)]
        for first_piece, launched in launches:
            run(
                scan_kernel,
                self.num_programs(launched),
                a,
                b,
                c,
                out,
                _strides(a),
                _strides(b),
                _strides(c),
                self.slopes,
                cuts if outer is None else outer,
                cuts,
                cuts if leaving is None else leaving,
                self.words,
                first_piece=first_piece,
                launched=launched,
                HAS_OUTER=outer is not None,
                IS_CUT=len(pieces) > 1,
                STORE_LEAVING=leaving is not None,
                STORE_CUT=fills_cuts and in_turn and len(pieces) > 1,
                TRANSPOSED=transposed,
                REVERSE=self.reverse,
                **self.sizes(),
            )
        return out

    def num_programs(self, pieces: int) -> int:
        return self.plan.batch * pieces * self.plan.heads * self.plan.slices


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def addressable(x: Tensor) -> Tensor:
    """`x`, or a copy where the hardware's tile loads need one: rows at multiples of 16 bytes.

    Views of a joint projection pass as they are; autograd's expanded gradients do not.
    """
    unit = 16 // x.element_size()
    row, token, head, number = x.stride()
    aligned = row % unit == token % unit == head % unit == x.data_ptr() % 16 == 0
    if aligned and min(row, token, head) > 0 and number == 1:
        return x
    # Not `contiguous`, which copies nothing where an address or a single row's stride is odd.
    return x.clone(memory_format=torch.contiguous_format)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory in which Triton's programs write their tile descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launches over a grid of one axis, on the device of the first argument."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            triton.set_allocator(_scratch)
            kernel[(programs,)](*arguments, **options)


@torch.library.custom_op("fulmen::lightning_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    piece_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state (empty unless asked for); for the backward pass: states at the cuts,
    documents (empty unless packed)."""
    plan = make_plan(q, piece_tokens)
    words = None if cu_seqlens is None else find_documents(plan, cu_seqlens)
    launcher = Launcher(plan, slopes, words)
    q, k, v = map(addressable, (q, k, v))
    states = launcher.cut_states(k, v, initial_state)
    final = q.new_empty(plan.state_shape if output_final_state else (0,), dtype=torch.float32)
    out = launcher.scan(
        q,
        k,
        v,
        outer=initial_state,
        cuts=states,
        leaving=final if output_final_state else None,
        transposed=False,
        fills_cuts=True,
    )
    return out, final, states, q.new_empty(0, dtype=torch.int64) if words is None else words


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    piece_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = make_plan(q, piece_tokens)
    words_shape = (0,) if cu_seqlens is None else plan.words_shape
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        q.new_empty(plan.state_shape if output_final_state else (0,), dtype=torch.float32),
        q.new_empty(plan.cuts_shape, dtype=torch.float32),
        q.new_empty(words_shape, dtype=torch.int64),
    )


@torch.library.custom_op("fulmen::lightning_attention_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    words: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    piece_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state (empty if there was none)."""
    plan = make_plan(q, piece_tokens)
    launcher = Launcher(plan, slopes, words)
    q, k, v, d_out = map(addressable, (q, k, v, d_out))
    d_final = None if d_final is None else d_final.contiguous()
    has_initial = initial_state is not None
    d_initial = q.new_empty(plan.state_shape if has_initial else (0,), dtype=torch.float32)
    dq = launcher.scan(
        d_out,
        v,
        k,
        outer=initial_state,
        cuts=states,
        leaving=None,
        transposed=True,
    )
    # dk and dv scan one sequence of states, of which dk takes the transposes.
    launcher = Launcher(plan, slopes, words, reverse=True)
    gradients = launcher.cut_states(q, d_out, d_final)
    dk = launcher.scan(
        v,
        d_out,
        q,
        outer=d_final,
        cuts=gradients,
        leaving=None,
        transposed=True,
        fills_cuts=True,
    )
    dv = launcher.scan(
        k,
        q,
        d_out,
        outer=d_final,
        cuts=gradients,
        leaving=d_initial if has_initial else None,
        transposed=False,
    )
    return dq, dk, dv, d_initial


@_attend_backward.register_fake
def _(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    words: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    piece_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = make_plan(q, piece_tokens)
    shape = (0,) if initial_state is None else plan.state_shape
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return dq, dk, dv, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, slopes, cu_seqlens, initial_state, output_final_state, piece_tokens = inputs
    ctx.set_materialize_grads(False)
    _, _, states, documents = output
    ctx.mark_non_differentiable(states, documents)
    words = None if cu_seqlens is None else documents
    ctx.save_for_backward(q, k, v, slopes, words, initial_state, states)
    ctx.output_final_state = output_final_state
    ctx.piece_tokens = piece_tokens


def _backward(
    ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, words, initial_state, states = ctx.saved_tensors
    dq, dk, dv, d_initial = _attend_backward(
        torch.zeros_like(q) if d_out is None else d_out,
        d_final if ctx.output_final_state else None,
        q,
        k,
        v,
        slopes,
        words,
        initial_state,
        states,
        ctx.piece_tokens,
    )
    d_state = None if initial_state is None else d_initial
    return dq, dk, dv, None, None, d_state, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`lightning_attention` by the Triton kernels, for arguments whose shapes it has checked.

    States are those of rows: with `cu_seqlens`, `initial_state` `[1, ...]` enters the first
    document, and the final state is that of the last one.

    Args:
        q, k, v: fp32 or bf16, one dtype; head_dim a power of two, 16 to 256. Any strides, but the
            numbers of a head must lie side by side (views of a joint projection do).
        slopes: receives no gradient.
        piece_tokens: length at which rows are cut for parallelism, a multiple of 64;
            0 chooses by heads, tokens and multiprocessors.

    Returns:
        Output, contiguous, and the final state in fp32 or None. A `ValueError` names what the
        kernels cannot take.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                f"lightning_attention: the Triton kernels need {name} in float32 or bfloat16 and "
                f"q, k, v of one dtype, got {x.dtype}"
            )
        if x.stride(3) != 1:
            raise ValueError(
                f"lightning_attention: {name} must be contiguous in its last dimension for the "
                f"Triton kernels (stride {x.stride(3)}); call .contiguous()"
            )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            "lightning_attention: the Triton kernels need a head_dim that is a power of two from "
            f"16 to 256, got {q.shape[3]}"
        )
    if piece_tokens % 64:
        raise ValueError(
            f"lightning_attention: piece_tokens must be a multiple of 64, got {piece_tokens}"
        )
    if q.shape[1] == 0:
        shape = (q.shape[0], q.shape[2], q.shape[3], q.shape[3])
        zeros = q.new_zeros(shape, dtype=torch.float32)
        final_state = zeros if initial_state is None else initial_state.float()
        return v.clone(), final_state if output_final_state else None
    out, final_state, _, _ = _attend(
        q,
        k,
        v,
        slopes.detach().to(q.device, torch.float32).contiguous(),
        None if cu_seqlens is None else cu_seqlens.to(q.device, torch.int32).contiguous(),
        None if initial_state is None else initial_state.float().contiguous(),
        output_final_state,
        piece_tokens,
    )
    return out, final_state if output_final_state else None
