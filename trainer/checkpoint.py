"""Sharded checkpoints: asynchronous, atomic, verified, loadable on any mesh.

A checkpoint is a folder of torch's distributed checkpoint (DCP) with logical tensors by name
(`model.*`, `exp_avg.*`, `exp_avg_sq.*`, all fp32), the trainer's state and configuration as text,
and a manifest with a checksum of every file. It is written under a temporary name and renamed when
whole; `latest` then points to it, and only then are old ones deleted.

A save that fails on any rank, mostly for a full disk, fails on all: what there is of it is removed,
training goes on, and the next one that is due tries again. One that takes too long ends the
process, because a thread that waits for a file system cannot be stopped.
"""

import concurrent.futures
import datetime
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fulmen.parallel.progress import end_process
from fulmen.trainer.config import CheckpointConfig
from fulmen.trainer.disk import describe_space
from fulmen.trainer.manifest import (
    CONFIG_FILE,
    CheckpointError,
    describe,
    verify,
    write_durably,
    write_manifest,
)
from fulmen.trainer.run_log import log

STATE_FILE = "trainer_state.json"
LATEST = "latest"
TIMEOUT_S = 1800.0
"""Time limit of a save."""
Result = TypeVar("Result")


class SaveError(CheckpointError):
    """A checkpoint could not be written, as all ranks know; those before it are untouched."""


class Checkpointer:
    """Writes and finds the checkpoints of one run; every method is called by all ranks."""

    def __init__(
        self, folder: Path, *, keep: int, timeout_s: float = TIMEOUT_S, max_failures: int = 1
    ) -> None:
        """`max_failures` is the number of saves in a row that fail and end the run."""
        self.folder = folder
        self.on_failure: Callable[[str], None] = lambda text: None
        """Gets on rank 0, from the writing thread, why a save failed."""
        self._keep, self._timeout_s, self._max_failures = keep, timeout_s, max_failures
        self._failures, self._began = 0, 0.0
        # Collectives of the writing thread must not mix with those of training.
        limit = datetime.timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=limit)
        self._rank = dist.get_rank(self._group)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._host_meshes: dict[DeviceMesh, DeviceMesh] = {}

    @classmethod
    def of_run(cls, run_dir: Path, config: CheckpointConfig) -> "Checkpointer":
        """That of a run's own checkpoints."""
        return cls(
            run_dir / "checkpoints",
            keep=config.keep,
            timeout_s=config.timeout_s,
            max_failures=config.max_failures,
        )

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        config: str,
        kept: Callable[[int], bool] | None = None,
    ) -> None:
        """Copy the tensors and write them in the background; waits for the save before it.

        That one may have failed: `SaveError` only if it was the last of `max_failures` in a row.
        Of the checkpoints whose step is `kept`, the newest stays beside the `keep` newest of all.
        """
        self.settle()
        staged = self._copy_to_host(tensors)
        size = dist.get_world_size(self._group)
        needed = sum(
            tensor.numel() * tensor.element_size() * (size if name.startswith("rng.") else 1)
            for name, tensor in tensors.items()
        )
        self._began = time.monotonic()
        write = partial(self._write, step, staged, dict(state), config, kept)
        self._pending = self._thread.submit(self._try_to_write, step, write, needed)

    def settle(self) -> None:
        """Wait for the save under way; `SaveError` if it is the last of `max_failures` in a row."""
        try:
            self.wait()
        except SaveError:
            if self._failures >= self._max_failures:
                raise

    def wait(self) -> None:
        """Wait for the save under way, and raise what it raised: `SaveError` if it failed.

        A save that takes longer than the time limit ends the process.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        left = self._began + self._timeout_s - time.monotonic()
        if not concurrent.futures.wait([pending], max(0.0, left)).done:
            self._give_up()
        try:
            pending.result()
        except SaveError:
            self._failures += 1
            raise
        self._failures = 0

    def has_failed(self) -> bool:
        """Whether the save under way is known, here, to be one that ends the run; does not wait.

        Ranks learn it at different times: once one of them does, all are to `wait`.
        """
        pending = self._pending
        if pending is None:
            return False
        if not pending.done():
            if time.monotonic() > self._began + self._timeout_s:
                self._give_up()
            return False
        error = pending.exception()
        may_go_on = isinstance(error, SaveError) and self._failures + 1 < self._max_failures
        return error is not None and not may_go_on

    def _give_up(self) -> NoReturn:
        end_process(
            f"a checkpoint is being written for more than checkpoint.timeout_s="
            f"{self._timeout_s:g} s: the file system of {self.folder} does not answer, or is too "
            "slow. The checkpoints before it are whole; start again to go on from the newest"
        )

    def close(self) -> None:
        """Finish the save under way and stop the writing thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def find_newest(self, usable: Callable[[int], bool] = lambda step: True) -> Path | None:
        """The newest whole checkpoint of those whose step is `usable`.

        Broken ones are named in the log and passed over.
        """
        for path in _newest_first(self._broadcast(self._listing())):
            if not usable(step_of(path) or 0):
                continue
            reason = self.find_fault(path)
            if reason is None:
                return path
            log.warning("%s; trying the checkpoint before it", reason)
        return None

    def find_fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None; the ranks share the work and agree."""
        ranks = dist.get_world_size(self._group)
        try:
            self._together(lambda: verify(path, part=self._rank, parts=ranks))
        except CheckpointError as error:
            return str(error)
        return None

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
        """Fill `tensors` in place from a checkpoint that was found whole.

        Returns the trainer's state (empty for imported weights) and the names that the checkpoint
        does not have. A `model.*` tensor missing, left over or of another shape is an error.
        """
        stored = self._stored(path)
        absent = [name for name in tensors if name not in stored]
        wanted = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in absent or name.startswith("model.")
        }
        self.load_some(path, wanted, all_of_it=True)
        file = path / STATE_FILE
        return (json.loads(file.read_text()) if file.exists() else {}), absent

    def load_some(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        *,
        all_of_it: bool = False,
        spare: tuple[str, ...] = (),
    ) -> None:
        """Fill `tensors` in place; one that is missing or of another shape is an error.

        With `all_of_it` so is a `model.*` tensor of the checkpoint that is not wanted, unless its
        name begins like one of `spare`.
        """
        stored = self._stored(path)
        for name, tensor in tensors.items():
            if name not in stored:
                raise CheckpointError(f"{path} is of another model: it has no {name}")
            size = getattr(stored[name], "size", tensor.shape)
            if size != tensor.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(size)}, this model's is {tuple(tensor.shape)}"
                )
        for name in stored if all_of_it else ():
            known = name in tensors or name.startswith(spare)
            if name.startswith("model.") and not known:
                raise CheckpointError(f"{path} is of another model: it has {name}")
        reader = dcp.FileSystemReader(path)
        dcp.load(dict(tensors), storage_reader=reader, process_group=self._group)

    @staticmethod
    def _stored(path: Path) -> Mapping[str, Any]:
        return dcp.FileSystemReader(path).read_metadata().state_dict_metadata

    def _copy_to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory that is kept for the next save; sharded as the originals are."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self._buffers:
                self._buffers[name] = torch.empty(
                    local.shape, dtype=local.dtype, pin_memory=local.is_cuda
                )
            copy = self._buffers[name].copy_(local, non_blocking=True)
            copies[name] = copy
            if isinstance(tensor, DTensor):
                copies[name] = DTensor.from_local(
                    copy,
                    self._host_mesh(tensor.device_mesh),
                    tensor.placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same ranks as a mesh of CPUs, which a tensor in host memory needs."""
        if mesh not in self._host_meshes:
            on_host = mesh.device_type == "cpu"
            self._host_meshes[mesh] = mesh if on_host else DeviceMesh("cpu", mesh.mesh)
        return self._host_meshes[mesh]

    def _try_to_write(self, step: int, write: Callable[[], None], needed: int) -> None:
        try:
            write()
        except (CheckpointError, CheckpointException) as error:  # all ranks have it
            reason = _reason(error)
            if self._rank == 0:
                shutil.rmtree(self._draft(step), ignore_errors=True)
            failed = f"the checkpoint of step {step} could not be saved: {reason}. "
            failed += describe_space(self.folder, needed)
            number, most = self._failures + 1, f"checkpoint.max_failures={self._max_failures}"
            then = f"failure {number} in a row of {most}: it goes on, and the next save tries again"
            if number >= self._max_failures:
                then = f"that is {most} in a row: the run ends"
            if self._rank == 0:
                log.error("%s; %s", failed, then)
                self.on_failure(failed)
            raise SaveError(f"{failed}. The checkpoints before it are untouched") from None

    def _draft(self, step: int) -> Path:
        return self.folder / f".step_{step}.writing"

    def _write(
        self,
        step: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        config: str,
        kept: Callable[[int], bool] | None,
    ) -> None:
        final = self.folder / f"step_{step}"
        temporary = self._draft(step)

        def begin() -> None:
            if self._rank == 0:
                self._remove_leftovers()  # of a run that was killed: there may be no room beside
                temporary.mkdir(parents=True)
                write_durably(temporary / STATE_FILE, json.dumps(state, indent=1))
                write_durably(temporary / CONFIG_FILE, config)

        def describe_own_files() -> dict[str, Any]:
            names = [file.name for file in temporary.glob(f"__{self._rank}_*")]
            if self._rank == 0:
                names += [".metadata", STATE_FILE, CONFIG_FILE]
            return {name: describe(temporary, name) for name in names}

        def finish() -> None:
            if self._rank == 0:
                write_manifest(
                    temporary, {name: e for part in described for name, e in part.items()}
                )
                _set_aside(final)
                temporary.rename(final)
                try:
                    _point_latest(self.folder / LATEST, final.name)
                    self._delete_old(step, kept)
                except OSError as error:
                    log.warning("%s is whole, but what follows a save failed: %s", final, error)

        self._together(begin)
        # No copy-ahead, the tensors are on the host: it would open a context on GPU 0 in each
        # process, for what is the current device in the main thread is not in this one.
        writer = dcp.FileSystemWriter(temporary, thread_count=1, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=self._group)
        described = self._together(describe_own_files)
        self._together(finish)

    def _together(self, action: Callable[[], Result]) -> list[Result]:
        """Do something on every rank and gather what it gives; if it fails on one, raise on all.

        Otherwise the others would wait for the one that failed until their time-out.
        """
        result, reason = None, None
        try:
            result = action()
        except Exception as error:
            reason = f"{error}" if isinstance(error, CheckpointError) else repr(error)
        box: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(box, (result, reason), group=self._group)
        for rank, (_, failure) in enumerate(box):
            if failure is not None:
                raise CheckpointError(failure if len(box) == 1 else f"rank {rank}: {failure}")
        return [result for result, _ in box]

    def _delete_old(self, step: int, kept: Callable[[int], bool] | None) -> None:
        # Those of later steps are broken, or they would have been resumed from: they do not count.
        newest = [
            path
            for path in _newest_first(self._listing())
            if (step_of(path) or 0) <= step and not _ends_a_stage(path)
        ]
        needed = [path for path in newest if kept is not None and kept(step_of(path) or 0)]
        for path in newest[self._keep :]:
            if path in needed[:1]:
                continue
            # Renamed first, so that a half-deleted folder is never taken for a checkpoint.
            path.rename(path.with_name(f".{path.name}.deleting"))
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _listing(self) -> list[Path]:
        return list(self.folder.glob("step_*")) if self._rank == 0 else []

    def _broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _reason(error: BaseException) -> str:
    """Why a save failed: the first rank's failure in DCP, or the text of an error of ours."""
    if not isinstance(error, CheckpointException):
        return f"{error}"
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure!r}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint folder's name gives, or None for another folder."""
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match.group(1)) if match else None


def _ends_a_stage(path: Path) -> bool:
    """Whether it is a stage's last one, which stays whatever `keep` is; a torn one is not."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and bool(state.get("stage", {}).get("ended"))


def _newest_first(paths: list[Path]) -> list[Path]:
    steps = {path: step_of(path) for path in paths}
    numbered = {path: step for path, step in steps.items() if step is not None}
    return sorted(numbered, key=numbered.__getitem__, reverse=True)


def _set_aside(path: Path) -> None:
    """Rename a folder that is in the way: it may be a broken checkpoint somebody wants to see."""
    number = 0
    while path.exists():
        target = path.with_name(f"{path.name}.replaced-{number}")
        number += 1
        if not target.exists():
            path.rename(target)


def _point_latest(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
