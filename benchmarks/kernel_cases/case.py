"""The parts of a case: what goes in, what must come out, who computes it, what it costs."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fulmen.kernels import registry

OURS = "fulmen triton"
REFERENCE = "fulmen torch"
COMPILED = "torch.compile"
MEMORY_BOUND_LENGTHS = (8192, 32768, 131072)
EPS = 1e-5


@dataclass(frozen=True)
class Settings:
    """Sizes, Text-01's unless given, and which providers run."""

    lengths: tuple[int, ...] | None = None
    """Tokens of a row; None: each op's own choice."""
    documents: int = 64
    """Of the packed rows, cut at random places; below 2: none is measured."""
    packed_length: int = 32768
    hidden: int = 6144
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64
    experts: int = 32
    choices: int = 2
    inner: int = 9216
    vocabulary: int = 200_064
    layers: int = 80
    rivals: bool = True
    """Also the references, torch.compile of them, and other projects' kernels."""
    tile: tuple[int, ...] | None = None
    """launch.Tile of lightning attention, its numbers in their order; None: the table's."""
    piece_tokens: int = 0
    """Where lightning attention cuts rows; 0: it chooses."""

    def lengths_or(self, *chosen: int) -> tuple[int, ...]:
        return chosen if self.lengths is None else self.lengths


@dataclass
class Inputs:
    """One set of arguments: a provider is called with `*leaves, *constants`."""

    leaves: list[Tensor]
    """Those that receive gradients."""
    constants: tuple[Any, ...] = ()
    gradients: tuple[Tensor | None, ...] = ()
    """One for each output, None where it has none; empty: the op has no backward pass."""

    def __post_init__(self) -> None:
        if self.gradients:
            for leaf in self.leaves:
                leaf.requires_grad_()

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.leaves, *self.constants

    @property
    def num_bytes(self) -> int:
        everything = [*self.arguments, *self.gradients]
        return sum(x.nbytes for x in everything if isinstance(x, Tensor))


@dataclass(frozen=True)
class Expected:
    """Part of one result of a provider, in fp64."""

    name: str
    index: int
    """Which output, or which leaf's gradient."""
    is_gradient: bool
    part: Callable[[Tensor], Tensor]
    value: Tensor


@dataclass(frozen=True)
class Cost:
    """What a pass must do at least. One of the two is 0 and does not count."""

    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass
class Provider:
    """An implementation, ready to be called."""

    call: Callable[..., Any]
    training: Callable[[Inputs], Any] | None = None
    """Replaces the call and its backward pass."""
    is_checked: bool = True


@dataclass
class Case:
    """One op at one shape."""

    op: str
    label: str
    tokens: int
    make: Callable[[torch.device, torch.dtype], Inputs]
    """From torch's global generator; a fresh set at each call."""
    truth: Callable[[Inputs], list[Expected]]
    forward: Cost
    training: Cost
    """Forward and backward together."""
    providers: dict[str, Callable[[], Provider]] = field(default_factory=dict)
    """Those that are installed, each made when its turn comes."""
    baseline: str = ""
    """The provider whose time the others' are a share of."""
    tolerance: float = 1e-2
    """Norm of the error over the norm of the truth, for bf16 inputs."""


Outputs = tuple[Tensor, ...]


def as_tuple(outputs: Any) -> Outputs:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def through_registry(
    call: Callable[..., Any], choices: dict[str, str], *, compiled: bool = False
) -> Callable[[], Provider]:
    """A public op with its implementation asked for; the request holds until the next provider."""

    def make() -> Provider:
        registry.configure(choices)
        return Provider(torch.compile(call, dynamic=False) if compiled else call)

    return make


def own_providers(
    op: str, call: Callable[..., Any], settings: Settings, *, compiled: bool = True
) -> dict[str, Callable[[], Provider]]:
    """Ours and, with the rivals, our reference and torch.compile of it."""
    providers = {OURS: through_registry(call, {op: "triton"})}
    if settings.rivals:
        providers[REFERENCE] = through_registry(call, {op: "torch"})
        if compiled:
            providers[COMPILED] = through_registry(call, {op: "torch"}, compiled=True)
    return providers


def rivals(settings: Settings, **makers: Callable[[], Callable[..., Any]]) -> dict[str, Any]:
    """Keeps those whose package is here: `fla=f` is called "fla", needs the module fla.

    A maker imports the package and returns what is measured. For a second one of a package write
    `liger_kernel__fp32=f`, shown as "liger_kernel fp32".
    """

    def provider(make: Callable[[], Callable[..., Any]]) -> Callable[[], Provider]:
        return lambda: Provider(make())

    return {
        name.replace("__", " "): provider(make)
        for name, make in makers.items()
        if settings.rivals and importlib.util.find_spec(name.split("__")[0]) is not None
    }


def random(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def rows_truth(
    formula: Callable[..., Any],
    inputs: Inputs,
    *,
    axis: int = 0,
    parameters: Sequence[int] = (),
    shown: int = 256,
    chunk: int = 4096,
) -> list[Expected]:
    """Truth of an op that treats each row alone: outputs and gradients of the first and last rows.

    Args:
        formula: the op on fp64 tensors with `inputs.arguments`.
        axis: of the rows, in all leaves and gradients. Constants that are tensors have it first.
        parameters: leaves without rows; their gradients are summed over all rows.
        shown: rows at each end.
    """
    rows = inputs.leaves[next(i for i in range(99) if i not in parameters)].shape[axis]
    shown = min(shown, rows)

    def run(start: int, length: int) -> tuple[Outputs, Outputs]:
        def cut(x: Tensor, axis: int) -> Tensor:
            return x.detach().narrow(axis, start, length).double()

        leaves = [
            x.detach().double() if i in parameters else cut(x, axis)
            for i, x in enumerate(inputs.leaves)
        ]
        leaves = [x.requires_grad_() for x in leaves]
        constants = [cut(x, 0) if isinstance(x, Tensor) else x for x in inputs.constants]
        outputs = as_tuple(formula(*leaves, *constants))
        given = [cut(x, axis) for x in inputs.gradients if x is not None]
        return outputs, torch.autograd.grad(outputs, leaves, given)

    def ends(x: Tensor) -> Tensor:
        last = x.narrow(axis, rows - shown, shown)
        return torch.cat([x.narrow(axis, 0, shown), last], axis)

    first, last = run(0, shown), run(rows - shown, shown)
    totals = {i: torch.zeros_like(first[1][i]) for i in parameters}
    for start in range(0, rows if parameters else 0, chunk):
        _, gradients = run(start, min(chunk, rows - start))
        for i in parameters:
            totals[i] += gradients[i]
    expected = []
    for kind in (0, 1):
        for i, parts in enumerate(zip(first[kind], last[kind], strict=True)):
            name = f"gradient {i}" if kind else f"output {i}"
            if kind and i in totals:
                expected.append(Expected(name, i, True, lambda x: x, totals[i]))
            else:
                value = torch.cat([part.detach() for part in parts], axis)
                expected.append(Expected(name, i, bool(kind), ends, value))
    return expected
