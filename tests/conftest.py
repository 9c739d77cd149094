"""Fixtures of all rooms. Tests run with one thread a process, so that sums have one order."""

import os
import sys

# Hundreds of processes import fulmen; without its bytecode each compiles it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Everything but the tests marked `gpu` is about the CPU, also on a machine with GPUs.
if os.environ.get("FULMEN_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
    os.environ.pop(name, None)

import logging  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def untied_log() -> None:
    """fulmen's log as at first: a run in another test of this process ties it to its folder and to
    the console, and cuts it off the root."""
    log = logging.getLogger("fulmen")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder, made by fulmen's own preparation; read only."""
    from support.tiny import prepare_tiny_data

    return prepare_tiny_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture
def one_rank() -> Iterator[torch.device]:
    """The test's own process as a world of one."""
    import torch.distributed as dist

    from fulmen.parallel.rendezvous import join_world

    yield join_world()
    dist.destroy_process_group()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What fulmen logs from INFO on, as it comes."""
    texts: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    log = logging.getLogger("fulmen")
    handler, level = Handler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield texts
    log.removeHandler(handler)
    log.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The documentation's commands first, then files with slow tests: workers take files in order,
    and a long one that begins last would leave the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_docs.py", item.path not in slow))
