"""How much of a step's communication runs beside its work: read from a profile of the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


def profile_steps(step: Callable[[], object], steps: int, trace: str | None = None) -> Any:
    """The device's events of so many steps, after one that does not count."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(trace)
    return [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def communication(events: list[Any], steps: int) -> dict[str, float]:
    """Milliseconds a step in NCCL's kernels, and of those the ones beside no other kernel."""
    nccl, work = [], []
    for event in events:
        interval = (event.time_range.start / 1e3, event.time_range.end / 1e3)
        (nccl if "nccl" in event.name.lower() else work).append(interval)
    exchanged, worked = merged(nccl), merged(work)
    total = sum(end - start for start, end in exchanged)
    hidden = shared(exchanged, worked)
    return {
        "exchanges_ms": round(total / steps, 3),
        "not_hidden_ms": round((total - hidden) / steps, 3),
        "work_ms": round(sum(end - start for start, end in worked) / steps, 3),
    }


def merged(intervals: list[Interval]) -> list[Interval]:
    """The same points in disjoint intervals, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def shared(a: list[Interval], b: list[Interval]) -> float:
    """Length of what lies in both; each is disjoint and in order."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
