"""What a GPU's memory held when it ran out, with the planner's table beside it.

RUN/oom/rank<R>.txt says what was asked for, where the step was, what the planner had predicted and
what the allocator counts; RUN/oom/rank<R>.pickle is a snapshot for pytorch.org/memory_viz.
"""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from fulmen.parallel.progress import place

FOLDER = "oom"
MAX_SNAPSHOTS = 8
"""In a folder: all ranks may run out at once, and a snapshot has some tens of MB."""
HISTORY_ENTRIES = 200_000
"""Allocations and releases that the history keeps, the newest."""
GIB = 2**30

log = logging.getLogger(__name__)
_watch: "_Watch | None" = None  # torch cannot be told to forget an observer, so there is one


def watch_memory(
    run_dir: Path, device: torch.device, predicted: Mapping[str, int], *, rank: int, history: bool
) -> None:
    """Write what there is to know when `device` runs out of memory; call at the start of a stage.

    `predicted` are the planner's bytes by part. With `history` the snapshot also says where each
    piece was allocated.
    """
    global _watch
    if _watch is None:
        # Not in torch's builds for CPUs alone.
        torch._C._cuda_attach_out_of_memory_observer(_report)  # type: ignore[attr-defined]
    _watch = _Watch(run_dir / FOLDER, predicted, rank)
    if history:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES, device=device)


def _report(device: int, asked: int, total: int, free: int) -> None:
    if _watch is not None:
        _watch.report(asked, total, free)


class _Watch:
    def __init__(self, folder: Path, predicted: Mapping[str, int], rank: int) -> None:
        self._folder, self._predicted, self._rank = folder, predicted, rank
        self._is_done = False

    def report(self, asked: int, total: int, free: int) -> None:
        """Called by torch in the allocation that fails, while everything is still held."""
        if self._is_done:
            return
        self._is_done = True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"rank{self._rank}.txt"
            summary = torch.cuda.memory_summary(abbreviated=True)
            path.write_text(
                describe(
                    self._predicted,
                    asked=asked,
                    total=total,
                    free=free,
                    allocated=torch.cuda.memory_allocated(),
                    reserved=torch.cuda.memory_reserved(),
                )
                + f"\n{summary}\n"
            )
            log.error("out of memory: %s", path)
            if len(list(self._folder.glob("*.pickle"))) < MAX_SNAPSHOTS:
                with path.with_suffix(".pickle").open("wb") as file:
                    pickle.dump(torch.cuda.memory._snapshot(), file)
        except Exception as error:  # torch is about to raise what matters
            log.warning("the memory could not be written down: %s", error)


def describe(
    predicted: Mapping[str, int],
    *,
    asked: int,
    total: int,
    free: int,
    allocated: int,
    reserved: int,
) -> str:
    """The failure and the planner's table, in GiB."""
    lines = [
        f"out of memory at {place()}",
        f"{asked / GIB:.2f} GiB asked for; of the device's {total / GIB:.2f} GiB {free / GIB:.2f} "
        "are free",
        "",
        f"{'predicted by the planner, at the peak':<40}{'GiB':>8}",
        *(f"  {name:<38}{size / GIB:>8.2f}" for name, size in predicted.items() if size),
        f"  {'sum':<38}{sum(predicted.values()) / GIB:>8.2f}",
        "",
        "held now",
        f"  {'allocated by tensors':<38}{allocated / GIB:>8.2f}",
        f"  {'reserved by torch':<38}{reserved / GIB:>8.2f}",
        f"  {'by CUDA, NCCL and other processes':<38}{(total - free - reserved) / GIB:>8.2f}",
    ]
    return "\n".join(lines) + "\n"
