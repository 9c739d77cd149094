"""Names and files of a run's folder."""

import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fulmen.trainer.config import RunConfig
from fulmen.trainer.run_log import log

DONE = "DONE"
LOCK = ".lock"
SUMMARY = "summary.json"
HERE_S, ELSEWHERE_S = 10.0, 120.0
"""How long an earlier process may hold a run's folder: one that has lost its torchrun ends within
seconds, and a file server forgets a lost machine's locks after a minute or two."""


def agree_on_folder(config: RunConfig, recipe: str) -> Path:
    """`run_root/recipe/run_id`, the same on all ranks; the default id comes from rank 0.

    On SLURM the default id is the job's, which stays the same over requeues, so that a requeued
    job resumes; elsewhere it is the date and time, so that a new command is a new run.
    """
    default = os.environ.get("SLURM_JOB_ID") or f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    box = [config.run_id or default]
    dist.broadcast_object_list(box, src=0)
    return Path(config.run_root) / recipe / box[0]


@contextmanager
def alone_in(run_dir: Path, timeout_s: float) -> Iterator[None]:
    """Keep other jobs out of the run's folder; `ValueError` on all ranks if one trains in it.

    The system lets go of the lock when rank 0 ends, however it ends. It is waited for no longer
    than half of `timeout_s`, that of the other ranks.
    """
    lock: int | None = None
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        box = [_take(lock, run_dir, timeout_s / 2)]
    try:
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise ValueError(box[0])
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _take(lock: int, run_dir: Path, most_s: float) -> str | None:
    """Why the lock cannot be had, or None."""
    host, began_s = socket.gethostname(), time.monotonic()
    job = os.environ.get("SLURM_JOB_ID")
    own = f"{host}, process {os.getpid()}" + (f" of job {job}" if job else "")
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, own.encode(), 0)
            return None
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return None  # a file system without locks, or one that is full
        holder = os.pread(lock, 1000, 0).decode()
        limit_s = HERE_S if holder.startswith(f"{host},") else ELSEWHERE_S
        if time.monotonic() > began_s + min(limit_s, most_s):
            if job and limit_s == ELSEWHERE_S and holder.endswith(f" of job {job}"):
                # SLURM starts a job anew when it has given up the machine that it ran on.
                log.warning("%s is locked by %s, a machine that is lost", run_dir, holder)
                return None
            return (
                f"{run_dir} is in use, by {holder or 'another process'}: two jobs in one folder "
                f"would overwrite each other. Stop that one (touch {run_dir}/STOP), or choose "
                f"another run_id; if it is gone for good, remove {run_dir / LOCK}"
            )
        time.sleep(0.5)


def update_summary(run_dir: Path, entries: dict[str, Any]) -> None:
    """Add entries to the run's `summary.json`, which the report shows."""
    path = run_dir / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(summary | entries, indent=1))
    temporary.replace(path)
