"""The run's log: one file a rank, and the console of rank 0."""

import logging
import sys
from pathlib import Path
from typing import TextIO

log = logging.getLogger("fulmen")


class _Console(logging.StreamHandler):
    """Standard error as it is now: the live progress line puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def start_logging(run_dir: Path, rank: int) -> None:
    """Log to `train.log` (rank 0) or `train.rank<N>.log`, and from rank 0 to standard error."""
    log.setLevel(logging.INFO)
    log.propagate = False
    name = "train.log" if rank == 0 else f"train.rank{rank}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / name)]
    if rank == 0:
        handlers.append(_Console())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers = handlers
