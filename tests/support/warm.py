"""A `python` that starts at once: its processes are forked from one that has imported torch.

To import torch takes each process two seconds of a core. Only other people's libraries are
imported in advance; fulmen is imported by each command itself, in the command's own order.

    python warm.py serve SOCKET        until its standard input is closed
    python warm.py run SOCKET WORD...  what `python WORD...` does: a script, -c or -m
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping
    from pathlib import Path
    from tempfile import TemporaryDirectory

LIBRARIES = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "hydra",
    "matplotlib.figure",
    "rich.progress",
    "tokenizers",
]

_kept: list[tuple[TemporaryDirectory[str], subprocess.Popen[bytes]]] = []


def start(path: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The server at the socket `path`; leaving it ends it, as the end of this process does.

    `environment` holds changes to this process's, for the libraries that are imported.
    """
    import subprocess

    serving = [sys.executable, __file__, "serve", str(path)]
    process = subprocess.Popen(
        serving,
        env=os.environ | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    while not path.exists():
        assert process.poll() is None, "the server ended"
        time.sleep(0.02)
    return process


def python(path: Path) -> list[str]:
    """Stands for sys.executable in a command."""
    return [sys.executable, "-I", "-S", __file__, "run", str(path)]


@functools.cache
def shared_python(**environment: str) -> list[str]:
    """The same, of a server that all tests of this process share and that ends with it."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    folder = TemporaryDirectory()
    path = Path(folder.name) / "socket"
    _kept.append((folder, start(path, environment)))
    return python(path)


def request(path: str, words: list[str]) -> int:
    """Have the server at `path` run `words` here, as this user's process; its exit code."""
    import json

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"0"], [0, 1, 2])
        told = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        connection.sendall(json.dumps(told).encode() + b"\n")
        return int(connection.makefile().readline())


def serve(path: str) -> list[str]:
    """Fork a process for each request; returns in those processes only, with their words."""
    import gc
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    # A lock that another thread holds would stay locked in the children.
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        first = os.fork()
        if first == 0:
            listener.close()
            return accompany(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def accompany(connection: socket.socket) -> list[str]:
    """Fork again, into the process itself and one that tells its end, or ends it with its caller.

    Returns in the process itself.
    """
    import json
    import signal

    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    told = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(told["folder"])
        os.environ.clear()
        os.environ.update(told["environment"])
        return told["words"]
    for file in files:
        os.close(file)
    process = os.pidfd_open(pid)
    ready, _, _ = select.select([process, connection], [], [])
    if process not in ready:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if process in ready:
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def become(words: list[str]) -> None:
    """What `python WORD...` does once it has started."""
    import runpy

    if words[0] == "-u":  # of torchrun, for which it makes no difference here
        words = words[1:]
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    job, path, *words = sys.argv[1:]
    if job == "run":
        code = request(path, words)
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    become(serve(path))
