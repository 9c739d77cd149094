"""Times, ceilings, and the check that comes before any figure."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_cases.case import Case, Cost, Expected, Inputs, Outputs, Provider, as_tuple

L2_BYTES = 256 * 2**20
"""Inputs of one measurement hold at least as much in sets of their own, so that no cache has them
from the last time."""
MOST_SETS = 64
MOST_TIMES, FEWEST_TIMES, BATCH = 200, 3, 10
CLOCK_HZ = 2e9
"""Upper bound of a multiprocessor's clock."""
LONGEST_HEAD_START_S = 0.1
FP32_TOLERANCE = 1e-4


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(
    run: Callable[[int], object], seconds: float, device: torch.device, steady_s: float = 0.0
) -> float:
    """Median time of `run(index)` over about `seconds`, after two warm-ups.

    With `steady_s` it runs for so long before: a chip at its power limit lowers its clock, which a
    short measurement does not meet.

    On a GPU by events, a batch at a time behind a pause, so that the host is ahead and its own time
    for a launch does not count: in training it is ahead too.
    """
    host = whole = 0.0
    for index in range(2):
        synchronize(device)
        started = time.perf_counter()
        run(index)
        host = time.perf_counter() - started
        synchronize(device)
        whole = time.perf_counter() - started
    index, steady_at = 2, time.perf_counter() + steady_s
    while time.perf_counter() < steady_at:
        for _ in range(BATCH):
            run(index)
            index += 1
        synchronize(device)
    wanted = int(min(MOST_TIMES, max(FEWEST_TIMES, seconds / max(whole, 1e-6))))
    times: list[float] = []
    while len(times) < wanted:
        count = min(BATCH, wanted - len(times))
        times += _timed_batch(run, len(times), count, host, device)
    return sorted(times)[len(times) // 2]


def _timed_batch(
    run: Callable[[int], object], first: int, count: int, host: float, device: torch.device
) -> list[float]:
    if device.type != "cuda":
        times = []
        for index in range(first, first + count):
            started = time.perf_counter()
            run(index)
            times.append(1e3 * (time.perf_counter() - started))
        return times
    head_start = min(LONGEST_HEAD_START_S, 1.2 * host * count)
    torch.cuda._sleep(int(head_start * CLOCK_HZ))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for index, (start, end) in enumerate(events):
        start.record()
        run(first + index)
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def copy_ceiling(device: torch.device, seconds: float) -> float:
    """TB/s of a device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**12, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda _: target.copy_(source), seconds, device) / 1e9


def matmul_ceiling(device: torch.device, seconds: float) -> float:
    """TFLOP/s of an 8192^3 product in bf16."""
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda _: a @ b, seconds, device) / 1e9


def measure_ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    return {
        "copy_tb_per_s": copy_ceiling(device, seconds),
        "matmul_tflop_per_s": matmul_ceiling(device, seconds),
    }


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The same at each call: what the truth is computed for."""
    torch.manual_seed(0)
    return case.make(device, dtype)


def make_sets(case: Case, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """`make_inputs`, and on a GPU others until no cache holds them all."""
    sets = [make_inputs(case, device, dtype)]
    if device.type == "cuda":
        count = min(MOST_SETS, -(-L2_BYTES // max(1, sets[0].num_bytes)))
        sets += [case.make(device, dtype) for _ in range(count - 1)]
    return sets


def forward_pass(provider: Provider, inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return as_tuple(provider.call(*inputs.arguments))


def training_pass(provider: Provider, inputs: Inputs) -> tuple[Outputs, Outputs]:
    """Outputs, and the gradients of all leaves."""
    outputs = as_tuple(provider.call(*inputs.arguments))
    pairs = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, inputs.gradients, strict=True)
        if gradient is not None
    ]
    gradients = torch.autograd.grad([x for x, _ in pairs], inputs.leaves, [g for _, g in pairs])
    return outputs, gradients


def relative_error(mine: Tensor, wanted: Tensor) -> float:
    """Norm of the error over the norm of `wanted`; NaN stays NaN."""
    if mine.shape != wanted.shape:
        return float("inf")
    error, size = (mine.double() - wanted.double()).norm(), wanted.double().norm()
    return float(error / size) if size else float(error)


def what_is_wrong(
    outputs: Outputs, gradients: Outputs | None, expected: list[Expected], tolerance: float
) -> tuple[str, float]:
    """Empty or the first result that is off, and the largest error."""
    worst = 0.0
    for item in expected:
        if item.is_gradient and gradients is None:
            continue
        results = gradients if item.is_gradient else outputs
        assert results is not None
        error = relative_error(item.part(results[item.index].detach()), item.value)
        if not error <= tolerance:  # NaN is not
            return f"{item.name} is off by {error:.1e}", error
        worst = max(worst, error)
    return "", worst


class Measurement:
    """One provider on one case: the check, then figures; `row` grows as they come."""

    def __init__(
        self,
        case: Case,
        provider: Provider,
        sets: list[Inputs],
        expected: list[Expected],
        seconds: float,
        steady_s: float = 0.0,
    ) -> None:
        self.case, self.provider, self.sets, self.expected = case, provider, sets, expected
        self.seconds, self.steady_s = seconds, steady_s
        first = sets[0]
        tensors = [x for x in (*first.leaves, *first.constants) if isinstance(x, Tensor)]
        self.device = tensors[0].device
        halves = any(x.dtype == torch.bfloat16 for x in tensors)
        self.tolerance = case.tolerance if halves else min(case.tolerance, FP32_TOLERANCE)
        self.row: dict[str, Any] = {}

    def run(self, ceilings: dict[str, float]) -> dict[str, Any]:
        passes = [("forward", self._forward, self.case.forward)]
        if self.sets[0].gradients:
            passes.append(("training", self._training, self.case.training))
        for name, run, cost in passes:
            try:
                wrong = self._check(name)
                if wrong:
                    # Of a wrong result no figure is given, of the other pass neither.
                    return {"failed": wrong}
                milliseconds = median_ms(run, self.seconds, self.device, self.steady_s)
                self._note(name, milliseconds, cost, ceilings)
                if name == "training" or len(passes) == 1:
                    self._note_memory(run)
            except torch.OutOfMemoryError:
                self.row[f"{name}_skipped"] = "out of memory"
        return self.row

    def _inputs(self, index: int) -> Inputs:
        return self.sets[index % len(self.sets)]

    def _forward(self, index: int) -> object:
        return forward_pass(self.provider, self._inputs(index))

    def _training(self, index: int) -> object:
        if self.provider.training is not None:
            return self.provider.training(self._inputs(index))
        return training_pass(self.provider, self._inputs(index))[1]

    def _check(self, name: str) -> str:
        """The first call, its time, and whether its results are right."""
        synchronize(self.device)
        started = time.perf_counter()
        gradients = None
        if not self.provider.is_checked:
            (self._forward if name == "forward" else self._training)(0)
            outputs: Outputs = ()
        elif name == "forward":
            outputs = forward_pass(self.provider, self.sets[0])
        else:
            outputs, gradients = training_pass(self.provider, self.sets[0])
        synchronize(self.device)
        self.row[f"{name}_first_call_s"] = round(time.perf_counter() - started, 2)
        if not self.provider.is_checked:
            return ""
        wrong, error = what_is_wrong(outputs, gradients, self.expected, self.tolerance)
        self.row["error"] = float(f"{max(error, self.row.get('error', 0.0)):.1e}")
        return wrong

    def _note(self, name: str, milliseconds: float, cost: Cost, ceilings: dict[str, float]) -> None:
        if cost.flops:
            unit, done, ceiling = "TFLOP/s", cost.flops, ceilings["matmul_tflop_per_s"]
        else:
            unit, done, ceiling = "TB/s", cost.num_bytes, ceilings["copy_tb_per_s"]
        rate = done / milliseconds / 1e9
        self.row |= {
            "unit": unit,
            f"{name}_ms": round(milliseconds, 4),
            f"{name}_rate": round(rate, 3),
            f"{name}_percent": round(100 * rate / ceiling, 1),
            f"{name}_ns_per_token": round(1e6 * milliseconds / self.case.tokens, 3),
        }

    def _note_memory(self, run: Callable[[int], object]) -> None:
        """Peak beyond the inputs, in GiB: results, gradients and scratch."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run(0)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self.row["extra_gib"] = round(peak / 2**30, 3)
