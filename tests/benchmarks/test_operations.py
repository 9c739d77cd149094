"""The benchmark of resuming and saving: its clock, and the doors that it listens at."""

import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

# Only while it is imported, as in test_kernel_cases.py.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import operations  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def test_a_part_inside_of_another_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(operations, "BEGAN", 100.0)

    class Work:
        def outer(self) -> str:
            now[0] += 2
            self.inner()
            now[0] += 1
            return "done"

        def inner(self) -> None:
            now[0] += 10

    clock = operations.Clock(99.0)
    clock.time(Work, "outer", "model, sharded")
    clock.time(Work, "inner", "loader")
    now[0] += 5
    clock.go_on("rest")
    now[0] += 0.5
    assert Work().outer() == "done"
    clock.enter("rendezvous")
    clock.leave()
    assert {name: seconds for name, seconds in clock.parts.items() if seconds} == {
        "torchrun": 1,
        "imports and configuration": 5,
        "model, sharded": 3,
        "loader": 10,
        "rest": 0.5,
    }


def test_every_door_is_there() -> None:
    for door, part in operations.DOORS.items():
        owner, _, name = door.rpartition(".")
        assert callable(getattr(operations.find(owner), name)), door
        assert part in operations.PARTS
