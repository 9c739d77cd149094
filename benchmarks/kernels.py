"""Speed of fulmen's kernels beside torch, torch.compile and fla, against the chip's own copy.

    python benchmarks/kernels.py [lengths=[32768]] [documents=64] [heads=64] output=DIR
    python benchmarks/kernels.py rivals=false lengths=[32768] tile=[64,64,8,3,2] segment_tokens=0

The second form tries another cut of the work: `tile` is launch.Tile's numbers in their order.
A provider's output and gradients are checked against the fp64 reference first, on two heads and in
the same run; one that fails gets no figures. TB/s counts each input read once and each output
written once (forward 4 tensors, forward and backward 11), per cent is of the device copy measured
in the run. Times are medians by CUDA events over inputs too many for the L2 cache. `output=DIR`
receives kernels.json and kernels.md. Without a GPU there is nothing to measure and it says so.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fulmen.models.layers import decay_slopes

DEFAULTS = {
    "lengths": [2048, 8192, 32768, 131072, 1048576],
    "documents": 64,
    "packed_length": 32768,
    "heads": 64,
    "head_dim": 128,
    "rivals": True,
    "tile": None,
    "segment_tokens": 0,
    "seconds": 1.0,
    "output": None,
}
LAYER, NUM_LAYERS = 40, 80
"""Whose slopes are taken, of Text-01's."""
TOLERANCE = 1e-2
"""Norm of the error over the norm of the fp64 result, for bf16 inputs."""
COMPILED_TOKENS = 8192
"""The compiler unrolls the reference's loop over chunks: beyond this it takes many minutes."""
L2_BYTES = 256 * 2**20
FORWARD_TENSORS, TRAINING_TENSORS = 4, 11

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, slopes, cu_seqlens) -> output."""


@dataclass(frozen=True)
class Case:
    """One shape: a row, or a row packed with documents of these lengths."""

    tokens: int
    heads: int
    head_dim: int
    documents: tuple[int, ...]

    @property
    def name(self) -> str:
        count = len(self.documents)
        return f"{self.tokens}" if count == 1 else f"{self.tokens} in {count} documents"

    def bytes_of(self, num_tensors: int) -> int:
        return num_tensors * self.tokens * self.heads * self.head_dim * 2


class Inputs:
    """Sets of random q, k, v and output gradient, enough of them that no cache holds all."""

    def __init__(self, case: Case, device: torch.device) -> None:
        shape = (1, case.tokens, case.heads, case.head_dim)
        self.sets: list[tuple[list[Tensor], Tensor]] = []
        for _ in range(min(64, max(1, -(-L2_BYTES // case.bytes_of(FORWARD_TENSORS))))):
            leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4)]
            gradient = leaves.pop()
            self.sets.append(([x.requires_grad_() for x in leaves], gradient))
        self.slopes = decay_slopes(case.heads, LAYER, NUM_LAYERS, device)
        bounds = [0, *itertools.accumulate(case.documents)]
        self.cu_seqlens = (
            torch.tensor(bounds, dtype=torch.int32, device=device)
            if len(case.documents) > 1
            else None
        )


def lightning_providers(tokens: int, options: Any) -> dict[str, Attention]:
    """Name -> attention: ours, then the rivals that are installed and can do this length."""
    from fulmen.kernels.lightning import launch
    from fulmen.kernels.lightning.reference import chunked_lightning_attention

    if options.tile:
        tile = launch.Tile(*options.tile)
        launch.choose_tile = lambda *_: tile

    def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None) -> Tensor:
        return launch.triton_lightning_attention(
            q, k, v, slopes, bounds, None, False, segment_tokens=options.segment_tokens
        )[0]

    def plain(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None) -> Tensor:
        return chunked_lightning_attention(q, k, v, slopes, bounds, None, False)[0]

    providers = {"fulmen triton": ours}
    if not options.rivals:
        return providers
    providers["fulmen reference"] = plain
    if tokens <= COMPILED_TOKENS:
        providers["torch.compile of reference"] = torch.compile(plain, dynamic=False)
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.simple_gla import chunk_simple_gla

        def rival(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bounds: Tensor | None) -> Tensor:
            bounds = None if bounds is None else bounds.long()
            return chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0, cu_seqlens=bounds)[0]

        providers["fla chunk_simple_gla"] = rival
    return providers


def relative_error(mine: Tensor, wanted: Tensor) -> float:
    return float((mine.double() - wanted).norm() / wanted.norm())


class Truth:
    """Output and gradients of the first and the last head, in fp64 by the reference."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        from fulmen.kernels.lightning.reference import chunked_lightning_attention

        leaves, gradient = inputs.sets[0]
        self.shown = sorted({0, case.heads - 1})
        exact = [x.detach()[:, :, self.shown].double().requires_grad_() for x in leaves]
        output, _ = chunked_lightning_attention(
            *exact, inputs.slopes[self.shown].double(), inputs.cu_seqlens, None, False
        )
        weight = gradient[:, :, self.shown].double()
        self.results = [output.detach(), *torch.autograd.grad(output, exact, weight)]

    def check(self, attention: Attention, inputs: Inputs, *, backward: bool) -> str:
        """Empty, or what is wrong."""
        leaves, gradient = inputs.sets[0]
        output = attention(*leaves, inputs.slopes, inputs.cu_seqlens)
        got = [output.detach()]
        if backward:
            got += torch.autograd.grad(output, leaves, gradient)
        for name, mine, wanted in zip(
            ("output", "dq", "dk", "dv"), got, self.results, strict=False
        ):
            error = relative_error(mine[:, :, self.shown], wanted)
            if not error <= TOLERANCE:
                return f"{name} is off by {error:.1e}"
        return ""


def median_ms(run: Callable[[int], object], seconds: float) -> float:
    """Median time of `run(index)`, after three warm-ups, over about `seconds`."""
    for index in range(3):
        run(index)
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < deadline and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(len(times))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_ceiling(device: torch.device, seconds: float) -> float:
    """TB/s of a device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda _: target.copy_(source), seconds)
    return 2 * source.nbytes / milliseconds / 1e9


def measure(
    attention: Attention, truth: Truth, inputs: Inputs, case: Case, options: Any, ceiling: float
) -> dict[str, Any]:
    """One provider on one shape: figures, or why there are none."""
    row: dict[str, Any] = {}

    def forward(index: int) -> None:
        leaves, _ = inputs.sets[index % len(inputs.sets)]
        with torch.no_grad():
            attention(*leaves, inputs.slopes, inputs.cu_seqlens)

    def training(index: int) -> None:
        leaves, gradient = inputs.sets[index % len(inputs.sets)]
        output = attention(*leaves, inputs.slopes, inputs.cu_seqlens)
        torch.autograd.grad(output, leaves, gradient)

    for name, run, tensors in (
        ("forward", forward, FORWARD_TENSORS),
        ("training", training, TRAINING_TENSORS),
    ):
        try:
            started = time.perf_counter()
            wrong = truth.check(attention, inputs, backward=run is training)
            torch.cuda.synchronize()
            row[f"{name}_first_call_s"] = round(time.perf_counter() - started, 2)
            if wrong:
                return {"failed": wrong}
            milliseconds = median_ms(run, options.seconds)
        except torch.OutOfMemoryError:
            row[f"{name}_skipped"] = "out of memory"
            torch.cuda.empty_cache()
            continue
        rate = case.bytes_of(tensors) / milliseconds / 1e9
        row |= {
            f"{name}_ms": round(milliseconds, 4),
            f"{name}_tb_per_s": round(rate, 3),
            f"{name}_percent_of_copy": round(100 * rate / ceiling, 1),
            f"{name}_ns_per_token": round(1e6 * milliseconds / case.tokens, 3),
        }
    return row


def uneven_lengths(tokens: int, count: int) -> tuple[int, ...]:
    """A row cut at random places, none of the parts empty."""
    generator = torch.Generator().manual_seed(0)
    cuts = (torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
    return tuple(end - start for start, end in itertools.pairwise([0, *cuts, tokens]))


def lightning_cases(options: Any) -> list[Case]:
    cases = [Case(n, options.heads, options.head_dim, (n,)) for n in options.lengths]
    if options.documents > 1:
        lengths = uneven_lengths(options.packed_length, options.documents)
        cases.append(Case(options.packed_length, options.heads, options.head_dim, lengths))
    return cases


def run_lightning(options: Any, device: torch.device, ceiling: float) -> list[dict[str, Any]]:
    """All shapes by all providers; prints each row as it comes."""
    rows = []
    for case in lightning_cases(options):
        torch._dynamo.reset()
        try:
            inputs = Inputs(case, device)
            truth = Truth(case, inputs)
        except torch.OutOfMemoryError:
            print(f"lightning {case.name}: the inputs do not fit", flush=True)
            continue
        for name, attention in lightning_providers(case.tokens, options).items():
            torch.cuda.empty_cache()
            row = {"op": "lightning", "tokens": case.name, "provider": name}
            row |= measure(attention, truth, inputs, case, options, ceiling)
            rows.append(row)
            print(json.dumps(row), flush=True)
        del inputs, truth
        torch.cuda.empty_cache()
    return rows


COLUMNS = {
    "tokens": "tokens",
    "provider": "provider",
    "forward_ms": "forward ms",
    "forward_tb_per_s": "TB/s",
    "forward_percent_of_copy": "% of copy",
    "training_ms": "forward + backward ms",
    "training_tb_per_s": "TB/s",
    "training_percent_of_copy": "% of copy",
    "first_calls_s": "first calls s",
}


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, headed by what it was measured on."""
    lines = [
        f"Lightning attention, {facts['heads']} heads of {facts['head_dim']}, bf16. "
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit "
        f"{facts['commit']}, {facts['date']}; copy {facts['copy_tb_per_s']} TB/s.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        calls = [row.get(f"{name}_first_call_s") for name in ("forward", "training")]
        values = dict(row)
        values["first_calls_s"] = " + ".join(str(call) for call in calls if call is not None)
        for name in ("forward", "training"):
            values.setdefault(f"{name}_ms", row.get("failed", row.get(f"{name}_skipped", "-")))
        lines.append("| " + " | ".join(str(values.get(key, "-")) for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def describe(options: Any, ceiling: float) -> dict[str, Any]:
    """What the figures were measured on."""
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "copy_tb_per_s": round(ceiling, 2),
        "heads": options.heads,
        "head_dim": options.head_dim,
        "tile": list(options.tile) if options.tile else "the table's",
        "segment_tokens": options.segment_tokens or "chosen",
    }


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(OmegaConf.create(DEFAULTS), OmegaConf.from_cli(sys.argv[1:]))
    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        sys.exit(
            f"benchmarks/kernels.py: unknown option {unknown[0]}; known: {', '.join(DEFAULTS)}"
        )
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device here, nothing to measure")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    ceiling = copy_ceiling(device, options.seconds)
    torch.cuda.empty_cache()
    facts = describe(options, ceiling)
    print(json.dumps(facts), flush=True)
    rows = run_lightning(options, device, ceiling)
    table = markdown(facts, rows)
    print(table)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))
        (folder / "kernels.md").write_text(table)


if __name__ == "__main__":
    main()
