"""Whether the host has room for the checkpoints of its ranks (trainer.offload_checkpoints)."""

import os
from pathlib import Path

from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import GIB, host_bytes

PINNED_SHARE = 0.7
"""Of the host's memory: pages that are pinned cannot be taken back from anybody."""
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def find_host_memory() -> int:
    """Bytes that this machine has, or that its processes were given."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _GROUP_LIMIT.read_text().strip() if _GROUP_LIMIT.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def check_host(config: RunConfig, ranks: int, total: int) -> None:
    """`ValueError` if `ranks` of one host with `total` bytes would pin too much of it."""
    needed = ranks * host_bytes(config)
    if needed <= PINNED_SHARE * total:
        return
    trainer = config.trainer
    less = "trainer.micro_batch_tokens smaller, parallel.cp larger"
    if trainer.chunk_tokens is not None:
        less += ", trainer.chunk_tokens=null (it keeps two inputs of a block)"
    raise ValueError(
        f"trainer.offload_checkpoints=true pins {needed / GIB:.1f} GiB of host memory for {ranks} "
        f"rank(s), more than {PINNED_SHARE:.0%} of the host's {total / GIB:.1f} GiB: set it to "
        f"false, or make {less}"
    )
