"""Tests of Triton kernels: on a GPU, or on the CPU through Triton's interpreter.

The interpreter is chosen before triton is imported, so a test file runs itself again in a process
with TRITON_INTERPRET=1 (`run_in_interpreter`). Triton 3.6 interprets only beside numpy below 2.4;
later ones beside any.
"""

import inspect
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import warm

_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_KERNELS = INTERPRETED or torch.cuda.is_available()

without_kernels = pytest.mark.skipif(
    RUNS_KERNELS, reason="they run here: on the GPU, or already interpreted"
)
compiles_only = pytest.mark.skipif(
    RUNS_KERNELS, reason="for machines that compile Triton kernels and cannot run them"
)
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter, and nothing new")


def _remember_members() -> None:
    """Triton lists the members of triton.language at each call of a function: a third of the time
    of interpreted tests. They are the same each time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # no longer, where a caller's patch holds
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    _remember_members()


def on_kernels(function: Any) -> Any:
    """Marks a test that launches Triton kernels on tensors of DEVICE."""
    skip = pytest.mark.skipif(not RUNS_KERNELS, reason="neither a GPU nor Triton's interpreter")
    return pytest.mark.gpu(skip(function))


def run_in_interpreter(file: str) -> None:
    """Run the tests of `file` (pass `__file__`) in a process where Triton interprets."""
    done = subprocess.run(
        [*warm.shared_python(**_ENVIRONMENT), "-m", "pytest", "-x", str(Path(file).resolve())],
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or a wild index: an element that no kernel writes shows.

    Ask for it with `pytestmark = pytest.mark.usefixtures("poisoned_allocations")`.
    """

    def poison(allocate: Any) -> Any:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            fresh = allocate(*args, **options)
            if fresh.device.type != DEVICE:
                return fresh
            is_float = fresh.is_floating_point()
            return fresh.fill_(float("nan") if is_float else torch.iinfo(fresh.dtype).max // 17)

        return poisoned

    if RUNS_KERNELS:
        monkeypatch.setattr(torch, "empty", poison(torch.empty))
        monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
        monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


class _Hopper:
    """A driver without a device: what Triton asks before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0


@pytest.fixture
def compiled_for_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Launches compile for sm_90 and run nothing; gives the (name, compiled kernel) of each.

    For machines without a GPU, and not in the interpreter: mark the test with `compiles_only`.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Hopper())
    return kernels


def assert_near(
    mine: Tensor, wanted: Tensor, tolerance: float, name: str, *, least: float = 1e-3
) -> None:
    """Largest error at most `tolerance` times the largest value (at least `least`); NaN fails."""
    if not wanted.numel():
        assert mine.shape == wanted.shape
        return
    error = (mine.detach().cpu().double() - wanted.detach().cpu().double()).abs().max()
    bound = tolerance * wanted.detach().abs().max().cpu().clamp(min=least)
    assert error <= bound, f"{name}: {error} > {bound}"  # a NaN is not <= anything
