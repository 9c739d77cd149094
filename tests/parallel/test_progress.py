"""What the ranks say when one of them does not go on: which exchange, and who is missing."""

import logging
import os
import threading
import time
import timeit

import pytest
import torch
import torch.distributed as dist
from support.worlds import free_port, rank_environment, run_processes

from fulmen.parallel import progress
from fulmen.parallel.progress import (
    GAVE_UP,
    LEFT,
    ExchangeError,
    Sign,
    describe,
    exchange,
    expect_compilation,
    phase,
    watched,
)
from fulmen.parallel.rendezvous import join_world

# ---- positions ----


def position() -> tuple[str, int, int]:
    here = progress._HERE
    return here.name, here.step, here.count


@pytest.mark.fast
def test_positions_nest_and_rise() -> None:
    phase("forward", 7)
    assert position() == ("forward", 7, 1)
    with exchange("states"):
        assert position() == ("states", 7, 2)
        with exchange("inner"):
            assert position() == ("inner", 7, 3)
        assert position() == ("states", 7, 4)
    assert position() == ("forward", 7, 5)
    phase("backward")
    assert position() == ("backward", 7, 6)
    phase("data", 8)
    assert position() == ("data", 8, 1)


@pytest.mark.fast
def test_the_first_step_of_its_kind_may_take_long() -> None:
    def is_patient(step: int) -> bool:
        phase("data", step)
        phase("forward")
        return progress._HERE.patient

    is_patient(1)
    assert not is_patient(2)
    expect_compilation()
    assert [is_patient(step) for step in (3, 4)] == [True, False]
    phase("evaluation")
    assert progress._HERE.patient


@pytest.mark.fast
def test_a_failure_leaves_its_position() -> None:
    phase("forward", 1)
    with pytest.raises(KeyError), exchange("outer"), exchange("inner"):
        raise KeyError
    assert position()[0] == "inner"


@pytest.mark.fast
def test_naming_an_exchange_costs_next_to_nothing() -> None:
    def named() -> None:
        with exchange("states"):
            pass

    assert min(timeit.repeat(named, number=1000, repeat=5)) / 1000 < 2e-5


# ---- reports ----


def sign(count: int, name: str = "states", *, step: int = 3, end: str = "") -> Sign:
    return Sign(step, count, name, beat=1, sent=0.0, end=end)


@pytest.mark.fast
def test_ranks_at_one_place_are_one_line() -> None:
    everyone = set(range(6))
    signs = {rank: sign(9) for rank in everyone} | {3: sign(2, "data"), 5: None}
    lines = [line.strip() for line in describe(signs, {4: 40.0}, everyone).splitlines()]
    assert lines == [
        "ranks 0-2: in states (step 3, position 9)",
        "rank 3: behind, in data (step 3, position 2)",
        "rank 4: not heard of for 40 s, last in states (step 3, position 9)",
        "rank 5: no sign of life so far",
        "missing: ranks 4-5",
    ]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("signs", "silent", "asked", "said"),
    [
        ({0: sign(4), 1: sign(2), 2: sign(2)}, {}, {0, 1}, "missing: rank 1"),
        ({0: sign(4), 1: sign(4), 2: sign(2)}, {}, {0, 1}, "missing: rank 2"),
        ({0: sign(1, step=4), 1: sign(9)}, {}, {0, 1}, "missing: rank 1"),
        ({0: sign(4), 1: sign(2), 2: sign(4)}, {2: 9.0}, {0, 1}, "missing: rank 2"),
        ({0: sign(4), 1: sign(4, end=GAVE_UP), 2: sign(2)}, {}, {0, 1, 2}, "missing: rank 2"),
        ({0: sign(4), 1: sign(4), 2: sign(9, end=LEFT)}, {}, {0, 1, 2}, "missing: rank 2"),
        ({0: sign(4), 1: sign(4)}, {}, {0, 1}, "look at the network and the devices"),
    ],
)
def test_who_is_missing(
    signs: dict[int, Sign | None], silent: dict[int, float], asked: set[int], said: str
) -> None:
    assert describe(signs, silent, asked).endswith(said)


# ---- processes ----


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def steps(fault: str, faulty: int) -> tuple[str, list[str], list[str]]:
    """Two steps of two exchanges; in the second one a rank goes wrong.

    Returns the error, what was logged, and the names of threads that are left.
    """
    progress.INTERVAL_S = 0.3
    lines = Lines()
    logging.getLogger("fulmen").addHandler(lines)
    join_world(timeout_s=6)
    rank, error = dist.get_rank(), ""
    try:
        with watched(rank, dist.get_world_size(), 6):
            for step in range(1, 3):
                phase("forward", step)
                if step == 2 and rank == faulty:
                    go_wrong(fault)
                for name in ("states", "counts"):
                    with exchange(name, dist.group.WORLD):
                        dist.all_reduce(torch.ones(1))
                phase("end")
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    left = [thread.name for thread in threading.enumerate() if thread.name == "progress"]
    return error, lines.said, left


def go_wrong(fault: str) -> None:
    if fault == "sleep":
        time.sleep(13)
    elif fault == "die":
        time.sleep(3 * progress.INTERVAL_S)  # for its last position to be told
        os._exit(1)
    elif fault == "raise":
        raise KeyError("lost")


def run_steps(fault: str, *, faulty: int, size: int = 3) -> list[tuple[str, list[str], list[str]]]:
    port = free_port()
    environments = [rank_environment(rank, size, port) for rank in range(size)]
    results = run_processes(steps, environments, fault, faulty, dying=faulty)
    assert all(result[2] == [] for result in results if result)
    return results


@pytest.mark.slow
def test_nothing_is_said_when_nothing_happens() -> None:
    assert run_steps("", faulty=-1) == [("", [], [])] * 3


@pytest.mark.slow
def test_a_rank_that_does_not_join_is_named() -> None:
    (first, *_), (second, *_), _ = results = run_steps("sleep", faulty=2)
    for error in (first, second):
        assert error.startswith("ExchangeError: states among ranks 0-2 (step 2, position 2) failed")
        assert "ranks 0-1: in states (step 2, position 2)\n" in error
        assert "rank 2: behind, in forward (step 2, position 1)\n" in error
        assert error.endswith("missing: rank 2")
    for rank in (0, 1):
        report = results[rank][1][0]  # before the time limit ended the exchange
        assert report.startswith(f"rank {rank} is in states among ranks 0-2 (step 2, position 2)")
        assert report.endswith("missing: rank 2")


@pytest.mark.slow
def test_a_rank_that_dies_is_named() -> None:
    for error, *_ in run_steps("die", faulty=2)[:2]:
        assert error.startswith("ExchangeError: states")
        assert "rank 2: not heard of for" in error
        assert "last in forward (step 2, position 1)" in error
        assert error.endswith("missing: rank 2")


@pytest.mark.slow
def test_the_death_of_the_rank_that_keeps_the_store_is_told() -> None:
    for result in run_steps("die", faulty=0)[1:]:
        assert result[0].startswith("ExchangeError: states")
        assert "does not answer: the process of rank 0" in result[0]


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_an_error_of_one_rank_is_told_by_the_others(faulty: int) -> None:
    results = run_steps("raise", faulty=faulty)
    assert results[faulty][0] == "KeyError: 'lost'"
    for rank in {0, 1, 2} - {faulty}:
        error, said, _ = results[rank]
        told = "\n".join([error, *said])
        assert f"rank {faulty}: stopped by KeyError: 'lost', in forward" in told
        assert f"missing: rank {faulty}" in told
        assert error.startswith(ExchangeError.__name__)
