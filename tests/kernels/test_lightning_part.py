"""Parts of a row, pass by pass, against the recurrence in fp64.

By the reference, and by the Triton kernels: with a GPU on it (marker gpu), without one in Triton's
interpreter.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from support.interpreter import (
    DEVICE,
    INTERPRETED,
    assert_near,
    compiles_only,
    on_gpu_only,
    on_kernels,
    run_in_interpreter,
    without_kernels,
)
from test_lightning import boundaries, recurrence
from torch import Tensor

from fulmen.kernels.lightning import (
    closing_state,
    combine_states,
    launch,
    launch_part,
    opening_gradient,
    part_backward_kv,
    part_backward_q,
    part_forward,
)
from fulmen.kernels.lightning.reference import chunked_lightning_attention

SLOPES = [0.0, 0.3]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
"""Largest error over largest value. bf16: the interpreter truncates where the GPU rounds."""

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@dataclasses.dataclass
class Part:
    """Documents of a part, the state that enters it, and the gradients of its two results."""

    lengths: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    entering: Tensor
    d_out: Tensor
    d_leaving: Tensor
    slopes: Tensor

    @property
    def bounds(self) -> Tensor | None:
        return boundaries(self.lengths).to(self.q.device) if len(self.lengths) > 1 else None


def make_part(
    lengths: list[int],
    dtype: torch.dtype,
    *,
    dim: int = 16,
    slopes: list[float] = SLOPES,
    device: str = DEVICE,
) -> Part:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, states = (1, sum(lengths), len(slopes), dim), (len(slopes), dim, dim)
    q, k, v, d_out = (torch.randn(tokens, generator=generator).to(dtype) for _ in range(4))
    state_dtype = torch.promote_types(dtype, torch.float32)
    entering, d_leaving = (torch.randn(states, generator=generator).to(state_dtype) for _ in "ab")
    part = Part(lengths, q, k, v, entering, d_out, d_leaving, torch.tensor(slopes))
    for field in ("q", "k", "v", "entering", "d_out", "d_leaving", "slopes"):
        setattr(part, field, getattr(part, field).to(device))
    return part


def attend(part: Part, q: Tensor, k: Tensor, v: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Output and leaving state, token by token."""
    states = [entering, *[torch.zeros_like(entering)] * (len(part.lengths) - 1)]
    out, finals = recurrence(q, k, v, part.slopes.cpu(), part.lengths, torch.stack(states))
    return out, finals[-1]


def attend_by_chunks(
    part: Part, q: Tensor, k: Tensor, v: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for long parts, by the reference."""
    bounds = boundaries(part.lengths)
    slopes = part.slopes.cpu().double()
    out, leaving = chunked_lightning_attention(q, k, v, slopes, bounds, entering[None], True)
    assert leaving is not None
    return out, leaving[0]


def wanted_of(part: Part, attend: Callable[..., Any] = attend) -> dict[str, Tensor]:
    """In fp64, gradients by autograd."""
    names = ("q", "k", "v", "entering", "d_out", "d_leaving")
    exact = {name: getattr(part, name).detach().double().cpu() for name in names}
    leaves = [exact[name].requires_grad_() for name in ("q", "k", "v", "entering")]
    out, leaving = attend(part, *leaves)
    gradients = torch.autograd.grad((out, leaving), leaves, (exact["d_out"], exact["d_leaving"]))
    names = ("dq", "dk", "dv", "d_entering")
    return {"out": out, **dict(zip(names, gradients, strict=True))}


def compare(
    part: Part,
    run: Callable[[Part], dict[str, Tensor]],
    tolerance: float,
    attend: Callable[..., Any] = attend,
) -> None:
    wanted = wanted_of(part, attend)
    for name, mine in run(part).items():
        assert mine.dtype == part.q.dtype
        assert_near(mine, wanted[name], tolerance, f"{name} of {part.lengths}")


def by_the_op(part: Part) -> dict[str, Tensor]:
    q, k, v, slopes, bounds = part.q, part.k, part.v, part.slopes, part.bounds
    out, kept = part_forward(q, k, v, slopes, bounds, part.entering)
    dq = part_backward_q(part.d_out, k, v, slopes, bounds, part.entering, kept)
    dk, dv = part_backward_kv(part.d_out, q, k, v, slopes, bounds, part.d_leaving, kept)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def by_the_kernels(part: Part, piece_tokens: int = 0) -> dict[str, Tensor]:
    q, k, v, d_out, slopes, bounds = part.q, part.k, part.v, part.d_out, part.slopes, part.bounds
    cut: dict[str, Any] = {"piece_tokens": piece_tokens}
    out, kept = launch_part.forward(q, k, v, slopes, bounds, part.entering, **cut)
    dq = launch_part.backward_q(d_out, k, v, slopes, part.entering, kept, **cut)
    dk, dv = launch_part.backward_kv(d_out, q, k, v, slopes, part.d_leaving, kept, **cut)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


REFERENCE_LENGTHS = [[1], [64], [65], [150], [1, 63, 64, 65], [130, 2], [1] * 70, [3, 70, 130]]


@pytest.mark.fast
@pytest.mark.parametrize("lengths", REFERENCE_LENGTHS)
def test_the_reference(lengths: list[int]) -> None:
    compare(make_part(lengths, torch.float64, device="cpu"), by_the_op, 1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("tokens", [1, 64, 130])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1e4])
def test_states_of_the_reference(tokens: int, slope: float) -> None:
    compare_states(make_part([tokens], torch.float64, slopes=[slope], device="cpu"), 1e-12)


def compare_states(
    part: Part,
    tolerance: float,
    closing: Callable[..., Tensor] = closing_state,
    opening: Callable[..., Tensor] = opening_gradient,
) -> None:
    part.entering.zero_()
    part.d_leaving.zero_()
    q, k, v, entering = (x.double().cpu() for x in (part.q, part.k, part.v, part.entering))
    _, leaving = attend_by_chunks(part, q, k, v, entering)
    wanted = wanted_of(part, attend_by_chunks)["d_entering"]
    states = closing(part.k, part.v, part.slopes), opening(part.q, part.d_out, part.slopes)
    assert_near(states[0], leaving, tolerance, "closing state")
    assert_near(states[1], wanted, tolerance, "opening gradient")
    for state in states:
        assert state.is_contiguous()
        assert state.dtype == torch.promote_types(part.k.dtype, torch.float32)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "piece_tokens"),
    [
        ([1], 0),
        ([130], 0),
        ([193], 64),
        ([1, 1], 0),
        ([63, 64, 65], 0),
        ([63, 64, 65], 64),
        ([65, 64, 63], 64),
        ([15, 16, 17, 130], 64),  # blocks of the fp32 kernels; the last document is cut
        ([130, 17, 16, 15], 64),  # the first one is
        ([1] * 9, 64),  # pieces without a chunk
        ([70, 200], 128),
        ([200, 70], 128),
    ],
)
def test_packed_parts(lengths: list[int], piece_tokens: int, dtype: torch.dtype) -> None:
    part = make_part(lengths, dtype)
    compare(part, lambda part: by_the_kernels(part, piece_tokens), TOLERANCE[dtype])


@on_kernels
@pytest.mark.parametrize("lengths", [[300], [100, 30, 170], [170, 30, 100]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_parts_in_windows(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "WINDOW_TOKENS", 128)
    monkeypatch.setattr(launch, "choose_num_pieces", lambda *_: 1)
    compare(make_part(lengths, dtype), by_the_kernels, TOLERANCE[dtype])


@on_kernels
@pytest.mark.parametrize("piece_tokens", [0, 64])
def test_fast_heads_of_parts(piece_tokens: int) -> None:
    part = make_part([300, 20], torch.float32, slopes=[1.0, 1e4, 1e-4])
    compare(part, lambda part: by_the_kernels(part, piece_tokens), TOLERANCE[torch.float32])


@on_kernels
@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[4000], [1000, 1, 2900, 97], [97, 1599, 64, 2240]])
@pytest.mark.parametrize("piece_tokens", [0, 512])
def test_larger_parts(lengths: list[int], piece_tokens: int, dtype: torch.dtype) -> None:
    part = make_part(lengths, dtype, dim=128, slopes=[2.0 ** -(i / 2) for i in range(16)])

    def run(part: Part) -> dict[str, Tensor]:
        return by_the_kernels(part, piece_tokens)

    compare(part, run, 2 * TOLERANCE[dtype], attend_by_chunks)
    whole = make_part([sum(lengths)], dtype, dim=128, slopes=[2.0, 0.3, 0.0])
    compare_states(whole, TOLERANCE[dtype])


@on_kernels
def test_a_head_in_slices() -> None:
    part = make_part([70, 1], torch.bfloat16, dim=128, slopes=[0.02])
    compare(part, lambda part: by_the_kernels(part, 64), TOLERANCE[torch.bfloat16])


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "piece_tokens"),
    [(1, 0), (16, 0), (17, 0), (64, 64), (65, 64), (150, 64), (200, 128)],
)
def test_states(tokens: int, piece_tokens: int, dtype: torch.dtype) -> None:
    part = make_part([tokens], dtype, slopes=[0.0, 2.0])

    def closing(*inputs: Tensor) -> Tensor:
        return launch_part.closing_state(*inputs, reverse=False, piece_tokens=piece_tokens)

    def opening(*inputs: Tensor) -> Tensor:
        return launch_part.closing_state(*inputs, reverse=True, piece_tokens=piece_tokens)

    compare_states(part, TOLERANCE[dtype], closing, opening)


@on_kernels
def test_a_row_in_parts_by_the_kernels() -> None:
    """Three parts, states handed on, equal the row; k and v are views of longer ones."""
    lengths, cuts = [30, 170, 40], [0, 80, 160, 240]
    row = make_part(lengths, torch.float32)
    bounds = [0, *accumulate(lengths)]
    wanted, _ = recurrence(
        *(x.double().cpu() for x in (row.q, row.k, row.v)), row.slopes.cpu(), lengths
    )
    state, outputs = torch.zeros_like(row.entering), []
    for first, end in pairwise(cuts):
        inside = [bound for bound in bounds if first < bound < end]
        mine = torch.tensor([0, *(b - first for b in inside), end - first], device=DEVICE).int()
        q, k, v = (x[:, first:end] for x in (row.q, row.k, row.v))
        outputs.append(launch_part.forward(q, k, v, row.slopes, mine, state)[0])
        last = int(mine[-2])
        own = launch_part.closing_state(k[:, last:], v[:, last:], row.slopes, reverse=False)
        if not inside:
            own += state * torch.exp(-row.slopes * (end - first))[:, None, None]
        state = own
    assert_near(torch.cat(outputs, 1), wanted, TOLERANCE[torch.float32], "output")


COMBINED_SLOPES = [0.0, 1e-6, 0.003, 0.3, 1e4, 1e30]
COMBINATIONS = [(0, 0), (0, 1), (3, 4), (0, 2), (1, 5), (0, 6)]
"""First and end of the parts that count, of six."""


def wanted_combination(
    gathered: Tensor, first: int, end: int, tokens: int, reverse: bool
) -> Tensor:
    """In fp64, as the ranks in between would hand a state on."""
    slopes = torch.tensor(COMBINED_SLOPES, dtype=torch.float64)
    state = torch.zeros(gathered.shape[1:], dtype=torch.float64)
    parts = range(first, end)
    for part in reversed(parts) if reverse else parts:
        through = torch.exp(-slopes * tokens)[:, None, None]
        state = state * through + gathered[part].double().cpu()
    return state


def gathered_states(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (6, len(COMBINED_SLOPES), 16, 16)
    gathered = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    gathered[0] *= 1e3  # the farthest one in one direction
    return gathered


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 100, 2**20])
def test_combined_states(tokens: int, reverse: bool, dtype: torch.dtype) -> None:
    gathered = gathered_states(dtype)
    slopes = torch.tensor(COMBINED_SLOPES, dtype=dtype)
    for first, end in COMBINATIONS:
        wanted = wanted_combination(gathered, first, end, tokens, reverse)
        state = combine_states(gathered, slopes, first, end, tokens, reverse=reverse)
        assert state.dtype == dtype
        assert_near(state, wanted, 1e-12 if dtype == torch.float64 else 3e-6, f"{first} to {end}")


@on_kernels
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 100, 2**20])
def test_combined_states_by_the_kernel(tokens: int, reverse: bool) -> None:
    gathered = gathered_states(torch.float32).to(DEVICE)
    slopes = torch.tensor(COMBINED_SLOPES, device=DEVICE)
    for first, end in COMBINATIONS:
        wanted = wanted_combination(gathered, first, end, tokens, reverse)
        unread = [part for part in range(6) if not first <= part < end]
        poisoned = gathered.index_fill(0, torch.tensor(unread, device=DEVICE).long(), float("nan"))
        for head, mine in enumerate(
            launch_part.combine_states(poisoned, slopes, first, end, tokens, reverse=reverse)
        ):
            # By head: a slow one's large states must not hide another's error.
            assert_near(mine, wanted[head], 2e-6, f"{first} to {end}, head {head}")


@on_kernels
def test_a_short_closing_state_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    run = launch.run

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        launches.append(kernel.fn.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(launch, "run", counted)
    for tokens, more in ((300, []), (400, ["carry_kernel"])):
        monkeypatch.setattr(launch_part, "LONGEST_WHOLE", 20)  # chunks of 16
        part = make_part([tokens], torch.float32, slopes=[0.0, 0.5])
        launches.clear()
        launch_part.closing_state(part.k, part.v, part.slopes, reverse=False)
        assert launches == ["local_state_kernel", *more]
        compare_states(part, TOLERANCE[torch.float32], *by_the_launcher())


def by_the_launcher() -> list[Callable[..., Tensor]]:
    return [partial(launch_part.closing_state, reverse=reverse) for reverse in (False, True)]


@pytest.mark.slow
@compiles_only
def test_combining_compiles_once(compiled_for_hopper: list[tuple[str, Any]]) -> None:
    """Whatever the ranks and the length of their parts are."""
    gathered, slopes = torch.zeros(5, 2, 128, 128), torch.zeros(2)
    for first, end, tokens in ((0, 2, 1), (1, 4, 4096), (0, 5, 33)):
        launch_part.combine_states(gathered, slopes, first, end, tokens, reverse=False)
    kernels = [kernel for name, kernel in compiled_for_hopper if name == "combine_kernel"]
    assert len(kernels) == 3
    assert len({id(kernel) for kernel in kernels}) == 1
    assert "ld.global.v4" in kernels[0].asm["ptx"]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not say what it reads")
def test_a_fast_head_reads_the_last_pieces_alone() -> None:
    part = make_part([256], torch.bfloat16, slopes=[2.0])
    part.k[:, :128], part.v[:, :128] = float("nan"), float("nan")
    state = launch_part.closing_state(part.k, part.v, part.slopes, reverse=False, piece_tokens=64)
    assert state.isfinite().all()


@pytest.mark.slow
@compiles_only
@pytest.mark.parametrize(("lengths", "piece_tokens"), [([256], 64), ([100, 156], 0)])
def test_parts_keep_the_pipeline(
    lengths: list[int], piece_tokens: int, compiled_for_hopper: list[tuple[str, Any]]
) -> None:
    """As much shared memory as the scans of a row that is no part; with a branch in the loop, it
    would be another plan of loads."""
    part = make_part(lengths, torch.bfloat16, dim=128, device="cpu")
    leaves = [x.requires_grad_() for x in (part.q, part.k, part.v)]
    launch.triton_lightning_attention(
        *leaves, part.slopes, part.bounds, None, False, piece_tokens=piece_tokens
    )[0].sum().backward()

    def shared() -> dict[str, set[int]]:
        sizes: dict[str, set[int]] = {}
        for name, kernel in compiled_for_hopper:
            sizes.setdefault(name, set()).add(kernel.metadata.shared)
        compiled_for_hopper.clear()
        return sizes

    ordinary = shared()
    with torch.no_grad():
        by_the_kernels(part, piece_tokens)
    assert shared() == ordinary
    assert min(ordinary["scan_kernel"]) > 128 * 1024
    for reverse in (False, True):
        launch_part.closing_state(
            part.k.detach(), part.v.detach(), part.slopes, reverse=reverse, piece_tokens=64
        )
    assert min(shared()["local_state_kernel"]) > 64 * 1024
