"""Traces of a window of steps: by `trainer.profile.from_step`, or by touching RUN/PROFILE.

The files are those of torch.profiler, for ui.perfetto.dev or chrome://tracing:
RUN/profile/step_<N>/rank<R>.json.gz, N the first step of the window.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from fulmen.parallel.mesh import Mesh
from fulmen.parallel.progress import exchange
from fulmen.trainer.profile_config import MAX_STEPS, ProfileConfig

REQUEST = "PROFILE"
"""A file of a run's folder; what it holds, if anything, is the number of steps."""
FOLDER = "profile"

log = logging.getLogger(__name__)


class Profiler:
    """Begins, steps and ends the traces of one rank. All ranks have one, and call it alike."""

    def __init__(self, config: ProfileConfig, mesh: Mesh, run_dir: Path) -> None:
        self._config, self._mesh, self._run_dir = config, mesh, run_dir
        self._trace: profile | None = None
        self._left = 0
        """Steps to come of the trace that runs, on this rank or others, its warm-up included."""
        self._wish: int | None = config.from_step
        self._wish_steps = config.steps

    def begin_step(self, step: int, *, may_ask: bool) -> bool:
        """Call before each step, counted from 1; returns whether a trace was written just now.

        `may_ask` lets a file ask for a trace: the same on all ranks, and after a step that waited
        for the device, because this waits for rank 0.
        """
        written = False
        if self._left:
            self._left -= 1
            if self._trace is not None:
                self._trace.step()
                if self._left == 0:
                    written = self._end()
        elif may_ask and (steps := self._asked()):
            self._wish, self._wish_steps = step + 1, steps
        if self._left == 0 and self._wish is not None and step <= self._wish <= step + 1:
            self._begin(step)
        return written

    def close(self) -> None:
        """Write what there is of a trace that the run's end cuts off."""
        self._end()

    def _asked(self) -> int:
        """Steps that RUN/PROFILE asks for, 0 for none; rank 0 looks, and takes the file away."""
        steps = 0
        request = self._run_dir / REQUEST
        if self._mesh.rank == 0 and request.exists():
            steps = self._read(request)
        if self._mesh.world_size > 1:
            box = torch.tensor(steps, device=self._mesh.device)
            with exchange("request of a profile"):
                dist.broadcast(box, src=0)
            steps = int(box)
        return steps

    def _read(self, request: Path) -> int:
        try:
            text = request.read_text().strip()
            request.unlink()
        except OSError as error:
            log.warning("%s: %s; no trace", request, error)
            return 0
        if not text:
            return self._config.steps
        if text.isdecimal() and 1 <= int(text) <= MAX_STEPS:
            return int(text)
        log.warning(
            "%s says %r, which is no number of steps from 1 to %d: tracing %d",
            request, text[:40], MAX_STEPS, self._config.steps,
        )  # fmt: skip
        return self._config.steps

    def _begin(self, step: int) -> None:
        """Trace from the wished step on; the one before it, if it is still to come, warms up."""
        assert self._wish is not None
        first, self._wish = self._wish, None
        warmup = first - step
        self._left = warmup + self._wish_steps
        if self._mesh.rank == 0:
            log.info("tracing steps %d to %d", first, first + self._wish_steps - 1)
        if self._mesh.rank >= self._config.ranks:
            return
        path = self._run_dir / FOLDER / f"step_{first}" / f"rank{self._mesh.rank}.json.gz"
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=self._wish_steps, repeat=1),
            on_trace_ready=lambda trace: self._write(trace, path),
            record_shapes=True,
        )
        self._trace.start()

    def _end(self) -> bool:
        self._left = 0
        if self._trace is None:
            return False
        trace, self._trace = self._trace, None
        trace.stop()
        return True

    def _write(self, trace: Any, path: Path) -> None:
        draft = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(draft))
            draft.replace(path)
        except (OSError, RuntimeError) as error:  # a full disk is no reason to end a run
            draft.unlink(missing_ok=True)
            log.warning("the trace %s could not be written: %s", path, error)
            return
        log.info("trace: %s", path)
