"""What a node's processes measure before training: work of each GPU, exchanges between them."""

import contextlib
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.parallel.rendezvous import join_world

_STAGES = ("start", "work", "within the node", "with a neighbour", "over all nodes")
_MATRIX = 8192
"""Rows and columns of the product on a GPU."""
_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 2**20
"""Of an exchange, at each rank."""
_LINGER_S = 10.0
"""For the other processes to say how far they came, after the first failure."""
_REPEATS = {"cuda": 10, "cpu": 2}


class NodeMeasurer:
    """Measures the node with a process for each rank, which a process of its own forks.

    A forked process has copies of the locks that threads held at that moment, and waits for them
    for ever. So the one that forks is made here, before the caller has threads (a store has some)
    or has touched CUDA.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._forker = context.Process(target=self._fork_when_asked, args=(theirs,))
        self._forker.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._forker.join(_LINGER_S)
        self._forker.kill()

    def measure(
        self, node: int, nodes: int, processes: int, *, on_gpu: bool, limit_s: float
    ) -> dict[str, Any]:
        """The measures of a node as trainer/preflight.py judges them; all nodes call it together,
        once.

        MASTER_ADDR and MASTER_PORT name a store that exists.
        """
        address = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        failure = "no result in time"
        try:
            self._pipe.send((address, node, nodes, processes, on_gpu, limit_s))
            if self._pipe.poll(limit_s + 2 * _LINGER_S):
                measures: dict[str, Any] = self._pipe.recv()
                return measures
        except (EOFError, ConnectionError):
            failure = "the process that measures died"
        return {"failure": failure, "reached": 0, "name": _STAGES[0]}

    def _fork_when_asked(self, pipe: Connection) -> None:
        self._pipe.close()
        with contextlib.suppress(EOFError):  # nobody asked
            pipe.send(_measure_node(*pipe.recv()))


def _measure_node(
    address: dict[str, str], node: int, nodes: int, processes: int, on_gpu: bool, limit_s: float
) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for local in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        ranks = {"RANK": node * processes + local, "LOCAL_RANK": local}
        sizes = {"WORLD_SIZE": nodes * processes, "LOCAL_WORLD_SIZE": processes}
        environment = address | {key: str(value) for key, value in (ranks | sizes).items()}
        worker = context.Process(target=_work, args=(theirs, environment, on_gpu, limit_s))
        worker.start()
        theirs.close()
        pipes.append(ours)
        workers.append(worker)
    try:
        results, failure, reached = _collect(pipes, time.monotonic() + limit_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if failure:
        return {"failure": failure, "reached": reached, "name": _STAGES[reached]}
    first = results[0]
    return {
        "failure": "",
        "reached": reached,
        "name": _STAGES[reached],
        "on_gpu": on_gpu,
        "clock": first["clock"],
        "tflops": [one["tflops"] for one in results],
        "checksums": [one["checksum"] for one in results],
        **{key: first[key] for key in ("node", "pairs", "all_reduce", "all_to_all")},
    }


def _collect(pipes: list[Connection], deadline: float) -> tuple[list[dict[str, Any]], str, int]:
    """Results by process, the first failure or '', and the number of the stage all came to."""
    reached = [0] * len(pipes)
    results: dict[int, dict[str, Any]] = {}
    failure, failed_at = "", len(_STAGES)
    while len(results) < len(pipes):
        open_pipes = [pipe for index, pipe in enumerate(pipes) if index not in results]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failure = failure or "no result in time"
            break
        for pipe in ready:
            index = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                kind, value = pipes[index].recv()
            except EOFError:
                kind, value = "failure", "its process died"
            if kind == "stage":
                reached[index] = value
                continue
            results[index] = value
            if kind == "failure" and reached[index] < failed_at:
                failure, failed_at = f"process {index}: {value}", reached[index]
                deadline = min(deadline, time.monotonic() + _LINGER_S)
    ordered = [results[index] for index in sorted(results)]
    return ordered, failure, min(reached)


def _work(pipe: Connection, environment: dict[str, str], on_gpu: bool, limit_s: float) -> None:
    os.environ.update(environment)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the parent on the first node has it
    try:
        if not on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        result = _measure(lambda stage: pipe.send(("stage", stage)), limit_s)
        pipe.send(("result", result))
    except Exception as error:
        pipe.send(("failure", f"{type(error).__name__}: {error}".partition("\n")[0][:300]))
    finally:
        pipe.close()
        os._exit(0)  # NCCL would wait for ranks that hang


def _measure(tell: Callable[[int], None], limit_s: float) -> dict[str, Any]:
    device = join_world(timeout_s=limit_s, meeting_s=limit_s)
    tell(1)
    tflops, checksum = _multiply(device) if device.type == "cuda" else (0.0, "")
    tell(2)
    rank, world = dist.get_rank(), dist.get_world_size()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    node, nodes = rank // local, world // local
    inside = _time_all_reduce(_group_of_nodes([node], local), device)
    tell(3)
    pairs = []
    # 0-1 2-3 ..., then 1-2 3-4 ...: each node with both of its neighbours, those at the ends too.
    for shift in (0, 1):
        first = (node - shift) // 2 * 2 + shift
        if first >= 0 and first + 1 < nodes:
            pairs.append(_time_all_reduce(_group_of_nodes([first, first + 1], local), device))
    tell(4)
    everyone = dist.group.WORLD
    assert everyone is not None
    all_reduce = _time_all_reduce(everyone, device)
    all_to_all = _time_all_to_all(everyone, device)
    dist.all_reduce(torch.zeros(1))  # on the host: all come out of it at the same time
    clock = time.time()
    return {
        "clock": clock,
        "tflops": tflops,
        "checksum": checksum,
        "node": inside,
        "pairs": [rate for rate in pairs if rate is not None],
        "all_reduce": all_reduce,
        "all_to_all": all_to_all,
    }


def _group_of_nodes(nodes: list[int], local: int) -> dist.ProcessGroup:
    ranks = [node * local + index for node in nodes for index in range(local)]
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _multiply(device: torch.device) -> tuple[float, str]:
    """TFLOP/s of bf16 products, and a digest of one whose bits are the same on like GPUs."""
    generator = torch.Generator().manual_seed(0)
    shape = (_MATRIX, _MATRIX)
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(device, torch.bfloat16)
        for _ in range(2)
    )
    product = left @ right
    seconds = _time(lambda: torch.mm(left, right, out=product), device, 100)
    digest = hashlib.sha256(product.view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:12]
    return 2 * _MATRIX**3 / seconds / 1e12, digest


def _time_all_reduce(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """Bus bandwidth in GB/s; None for a group of one."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return None
    buffer = _buffer(device, 1)
    seconds = _time(lambda: dist.all_reduce(buffer, group=group), device)
    return 2 * (ranks - 1) / ranks * buffer.nbytes / seconds / 1e9


def _time_all_to_all(group: dist.ProcessGroup, device: torch.device) -> float | None:
    """GB/s that each rank sends to the others; None for a group of one."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return None
    sent = _buffer(device, ranks)
    received = torch.empty_like(sent)
    seconds = _time(lambda: dist.all_to_all_single(received, sent, group=group), device)
    return (ranks - 1) / ranks * sent.nbytes / seconds / 1e9


def _buffer(device: torch.device, multiple: int) -> Tensor:
    size = (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4
    return torch.zeros(-(-size // multiple) * multiple, device=device)


def _time(action: Callable[[], Any], device: torch.device, repeats: int | None = None) -> float:
    """Seconds of one call, after one that does not count."""
    repeats = repeats or _REPEATS[device.type]
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats
