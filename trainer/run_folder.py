"""Names and files of a run's folder."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fulmen.trainer.config import RunConfig

DONE = "DONE"
SUMMARY = "summary.json"


def agree_on_folder(config: RunConfig, recipe: str) -> Path:
    """`run_root/recipe/run_id`, the same on all ranks; the default id comes from rank 0.

    On SLURM the default id is the job's, which stays the same over requeues, so that a requeued
    job resumes; elsewhere it is the date and time, so that a new command is a new run.
    """
    default = os.environ.get("SLURM_JOB_ID") or f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    box = [config.run_id or default]
    dist.broadcast_object_list(box, src=0)
    return Path(config.run_root) / recipe / box[0]


def update_summary(run_dir: Path, entries: dict[str, Any]) -> None:
    """Add entries to the run's `summary.json`, which the report shows."""
    path = run_dir / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(summary | entries, indent=1))
    temporary.replace(path)
