"""How the processes of a run meet, and what they must agree on before anything is built.

torch's own rendezvous waits in silence and then says that a socket timed out. Here each process
leaves its RANK and its settings in the store that the process group uses afterwards, so that when
some do not come, or have come with another configuration, every process ends with the same message,
which names them.
"""

import datetime
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MEETING_S = 300.0
"""Time limit for all processes to come."""
TIMEOUT_S = 600.0
"""Time limit of a collective."""
_LINGER_S = 5.0
"""The store lives on for so long after a failure, for all to read why."""
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOMS = ("launch", "trainer", "parallel", "models", "data", "kernels")
_GOOD = "good"
_MOST_DIFFERENCES = 8


class RendezvousError(ValueError):
    """The processes did not become one world; the message says what to look at."""


def join_world(
    settings: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    meeting_s: float = MEETING_S,
) -> torch.device:
    """Start the default process group and return this rank's device.

    Under torchrun (or any launcher that sets RANK and WORLD_SIZE) the ranks meet at its
    rendezvous; a plain `python` is a world of one. A launcher that sets only one of the two is an
    error: falling back to one process would train N copies side by side.

    Args:
        settings: nested configuration, which must be the same on all ranks.
        timeout_s: time limit of each collective.
        meeting_s: time limit for all ranks to come.
    """
    given = [name for name in _NAMES if name in os.environ]
    if given and len(given) < len(_NAMES):
        raise ValueError(
            f"the environment sets {', '.join(given)} but not all of RANK, WORLD_SIZE, MASTER_ADDR "
            "and MASTER_PORT: start with torchrun, or with none of them for one process"
        )
    if torch.cuda.is_available():
        if given and "LOCAL_RANK" not in os.environ:
            raise ValueError("the environment sets RANK but not LOCAL_RANK: start with torchrun")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        # Collectives that NCCL's flight recorder keeps, for dumps; 0 by default in some versions.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    else:
        device, backend = torch.device("cpu"), "gloo"
    rank, world_size = 0, 1
    store: dist.Store = dist.HashStore()
    if given:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        met = _meet(rank, world_size, device, settings or {}, meeting_s)
        store = dist.PrefixStore(of_attempt("world"), met)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world_size, store=store)
    return device


def set_timeout(timeout_s: float) -> None:
    """Give every group of this process that exists by now the time limit of the world.

    torch gives groups made later, those of a mesh too, a default of its own. (Sends and receives
    of gloo keep it.)
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def open_store(timeout_s: float, *, as_host: bool = False) -> dist.TCPStore:
    """A connection of its own to the store at MASTER_ADDR and MASTER_PORT.

    Only one thread can use a connection: one that waits for a key keeps the others out.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout_s
    if not as_host:
        _wait_for_port(host, port, timeout_s)
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(
            host, port, is_master=as_host, timeout=left, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if as_host:
            raise RendezvousError(
                f"rank 0 cannot listen on MASTER_PORT={port} of {socket.gethostname()}: {error} "
                "Another run or another process with RANK=0 may be there: choose another port"
            ) from None
        raise RendezvousError(
            f"what listens at MASTER_ADDR:MASTER_PORT={host}:{port} is no rank 0 of ours: {error} "
            "Choose another port"
        ) from None


def of_attempt(name: str) -> str:
    """A prefix for keys: an agent's store may outlive the processes that it starts again."""
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _wait_for_port(host: str, port: int, timeout_s: float) -> None:
    """Try to connect until it works: torch would print a stack trace for each failure."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"rank {os.environ['RANK']} of WORLD_SIZE={os.environ['WORLD_SIZE']} on "
                f"{socket.gethostname()} cannot reach MASTER_ADDR:MASTER_PORT={host}:{port} after "
                f"{timeout_s:.0f} s ({reason}). Look whether the process of rank 0 was started and "
                "still runs there (its log), whether MASTER_ADDR names its machine and MASTER_PORT "
                "is the same on all ranks, and whether a firewall closes the port"
            )
        time.sleep(0.2)


def _meet(
    rank: int,
    world_size: int,
    device: torch.device,
    settings: Mapping[str, Any],
    limit_s: float,
) -> dist.TCPStore:
    """Wait for all ranks and compare what they bring; the store in which they met."""
    if not 0 <= rank < world_size:
        raise RendezvousError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    deadline = time.monotonic() + limit_s
    # torchrun keeps a store in its agent, where rank 0 is a guest like others.
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = open_store(limit_s, as_host=is_host)
    meeting = dist.PrefixStore(of_attempt("meeting"), store)
    try:
        verdict = _hear_verdict(meeting, rank, world_size, _facts(device, settings), deadline)
        if verdict == _GOOD:
            return store
        meeting.add("heard", 1)
        linger = time.monotonic() + _LINGER_S
        while is_host and time.monotonic() < linger:
            if meeting.add("heard", 0) >= meeting.add("arrived", 0):
                break
            time.sleep(0.05)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {rank} lost {_address()} while it waited for the other ranks: the process of "
            f"rank 0, or torchrun beside it, has ended; its log says why ({error})"
        ) from None
    raise RendezvousError(verdict)


def _hear_verdict(
    meeting: dist.Store, rank: int, world_size: int, facts: dict[str, str], deadline: float
) -> str:
    """What the ranks find together. The first who knows says it; all others only read it."""
    started = time.monotonic()
    size_of_first = meeting.compare_set("size", "", f"{world_size} on rank {rank}").decode()
    if int(size_of_first.split()[0]) != world_size:
        _decide(meeting, f"WORLD_SIZE is {size_of_first} and {world_size} on rank {rank}")
    elif meeting.add(f"taken/{rank}", 1) > 1:
        host = facts["host"]
        _decide(meeting, f"two processes came with RANK={rank}, the second one from {host}")
    meeting.set(f"facts/{rank}", json.dumps(facts))
    if meeting.add("arrived", 1) == world_size:
        came = _came(meeting, world_size)
        if len(came) == world_size:
            _decide(meeting, _disagreement(came) or _GOOD)
    while not meeting.check(["verdict"]):
        if time.monotonic() > deadline:
            _decide(meeting, _absence(meeting, world_size, time.monotonic() - started))
        time.sleep(0.05)
    return meeting.get("verdict").decode()


def _decide(meeting: dist.Store, verdict: str) -> None:
    meeting.compare_set("verdict", "", verdict)


def _came(meeting: dist.Store, world_size: int) -> dict[int, dict[str, str]]:
    ranks = [rank for rank in range(world_size) if meeting.check([f"facts/{rank}"])]
    return {rank: json.loads(meeting.get(f"facts/{rank}")) for rank in ranks}


def _absence(meeting: dist.Store, world_size: int, waited_s: float) -> str:
    came = _came(meeting, world_size)
    hosts: dict[str, list[int]] = {}
    for rank, facts in came.items():
        hosts.setdefault(facts["host"], []).append(rank)
    missing = sorted(set(range(world_size)) - set(came))
    present = "; ".join(f"{name_ranks(ranks)} on {host}" for host, ranks in hosts.items())
    return (
        f"{len(came)} of WORLD_SIZE={world_size} processes came to {_address()} within "
        f"{waited_s:.0f} s. Missing: {name_ranks(missing)}. Came: {present}. Look whether the "
        "missing ones were started and what their logs say; whether they have the same "
        "MASTER_ADDR, MASTER_PORT and WORLD_SIZE; and whether their machines reach that port"
    )


def _disagreement(came: Mapping[int, Mapping[str, str]]) -> str:
    """What is wrong with the ranks as they came, or ''."""
    faults = [f"rank {rank}: {facts['fault']}" for rank, facts in came.items() if facts["fault"]]
    if faults:
        return "; ".join(faults)
    lines = []
    for key in dict.fromkeys(key for facts in came.values() for key in facts):
        ranks_of: dict[str, list[int]] = {}
        for rank, facts in came.items():
            ranks_of.setdefault(facts.get(key, "absent"), []).append(rank)
        if key != "host" and len(ranks_of) > 1:
            values = (f"{value} on {name_ranks(ranks)}" for value, ranks in ranks_of.items())
            lines.append(f"{key}: {', '.join(values)}")
    if not lines:
        return ""
    more = len(lines) - _MOST_DIFFERENCES
    rest = [f"and {more} more"] if more > 0 else []
    return (
        "the ranks are not of one run: start all with the same code, packages and arguments\n  "
        + "\n  ".join(lines[:_MOST_DIFFERENCES] + rest)
    )


def _facts(device: torch.device, settings: Mapping[str, Any]) -> dict[str, str]:
    """What this rank brings to the meeting. All but `host` and `fault` must be equal."""
    fault = ""
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        fault = (
            f"LOCAL_RANK={device.index}, but the process sees {torch.cuda.device_count()} GPU(s) "
            f"on {socket.gethostname()}: start at most one process per GPU (torchrun "
            "--nproc-per-node, CUDA_VISIBLE_DEVICES)"
        )
    return {
        "host": socket.gethostname(),
        "fault": fault,
        "device": device.type,
        "torch": str(torch.__version__),
        "source code": source_digest(),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "absent"),
        **dict(_flat(settings)),
    }


def source_digest() -> str:
    """Of our own Python files: unlike a commit's name it also tells edits that nobody committed."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _address() -> str:
    return f"MASTER_ADDR:MASTER_PORT={os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    ordered = sorted(ranks)
    runs = []
    for _, members in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in members]
        runs.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {', '.join(runs)}"
