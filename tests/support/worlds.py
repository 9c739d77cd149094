"""Run a function in several gloo processes."""

import gc
import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from support import HANG_S

# A fork server is a fresh process that has imported torch once, and nothing else has happened in
# it: its children start clean like spawned ones, without seconds of importing each. pytest and
# hypothesis are there because a child imports the test's own module.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "hypothesis", "matplotlib.figure", "fulmen.trainer.run", "fulmen.launch.pretrain"]
)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    Below those that the system deals out, of which another process may get it before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would put into the environment of one rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_world(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = HANG_S
) -> list:
    """Call `function(device, *args)` in `size` processes that form one world; results by rank.

    `function` is a module's own (children import it by name). What a rank raises is raised here,
    with that rank's traceback as a note; a world that hangs is killed and is a `TimeoutError`.
    """
    port = free_port()
    environments = [rank_environment(rank, size, port) for rank in range(size)]
    return run_processes(
        partial(_join_and_call, function), environments, *args, timeout_s=timeout_s
    )


def run_processes(
    function: Callable[..., Any],
    environments: list[dict[str, str]],
    *args: Any,
    timeout_s: float = HANG_S,
    dying: int | None = None,
) -> list:
    """Call `function(*args)` in a process per environment; results in that order.

    The process of index `dying` may end without a result.
    """
    pipes, processes = [], []
    for environment in environments:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_rank_main, args=(theirs, environment, function, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, processes, timeout_s, dying)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(
    pipes: list[Connection], processes: list[BaseProcess], timeout_s: float, dying: int | None
) -> list:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise TimeoutError(f"ranks {missing} did not finish within {timeout_s} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, result = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join()
                if rank == dying:
                    results[rank] = None
                    continue
                raise RuntimeError(f"rank {rank} died: {processes[rank].exitcode}") from None
            if error is not None:
                raise error
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple
) -> None:
    gc.freeze()  # what the fork server imported: a quarter second a collection
    os.environ.update(environment)
    try:
        # Plain pickle copies tensors; a multiprocessing queue would share memory that dies with us.
        message = pickle.dumps((None, function(*args)))
    except BaseException as error:
        who = f"rank {environment['RANK']} of {environment['WORLD_SIZE']}"
        error.add_note(f"in {who}:\n{traceback.format_exc()}")
        message = pickle.dumps((error, None))
    pipe.send_bytes(message)


def _join_and_call(function: Callable[..., Any], *args: Any) -> Any:
    import torch
    import torch.distributed as dist

    from fulmen.parallel.rendezvous import join_world

    torch.set_num_threads(1)
    device = join_world()
    result = function(device, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result
