"""Runs all jobs in a process of their own, so that a crash or a hang costs one row."""

import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from fulmen.kernels import registry
from kernel_cases import cases_of
from kernel_cases.case import Case, Expected, Settings
from kernel_cases.measure import Measurement, make_inputs, make_sets, measure_ceilings, synchronize

LEAVING_S = 20
"""For a process that has done its jobs, to end in good order."""


@dataclass(frozen=True)
class Plan:
    """What to run and for how long."""

    settings: Settings
    ops: tuple[str, ...]
    providers: tuple[str, ...] = ()
    """Parts of names; a provider runs if it contains one. Empty: all."""
    device: str = "cuda"
    dtype: str = "bfloat16"
    seconds: float = 0.3
    """For the times of one pass of one provider."""
    steady_s: float = 0.0
    """Under load before each of them, so that the clock has settled."""
    budget_s: float | None = None
    """No job begins later than this after the start."""
    stall_s: float = 400.0
    """A job that takes longer is given up."""

    def jobs(self) -> Iterator[tuple[Case, str]]:
        for op in self.ops:
            for case in cases_of(op, self.settings):
                for name in case.providers:
                    chosen = not self.providers or any(x in name for x in self.providers)
                    if chosen or name == case.baseline:
                        yield case, name


def run_jobs(
    plan: Plan,
    on_facts: Callable[[dict[str, Any]], None],
    on_row: Callable[[dict[str, Any]], None],
    *,
    worker: Callable[..., None] | None = None,
    start_method: str = "spawn",
) -> None:
    """All jobs of the plan; where a process dies or hangs, another goes on behind that job.

    Args:
        on_facts: receives what `work` sends first, once for each process without ceilings.
        on_row: receives a row for each job, in order.
        worker: takes the place of `work`.
    """
    jobs = [label(case, name) for case, name in plan.jobs()]
    deadline = None if plan.budget_s is None else time.time() + plan.budget_s
    context = multiprocessing.get_context(start_method)
    position = 0
    ceilings: dict[str, float] = {}
    while position < len(jobs):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=worker or work, args=(plan, position, deadline, ceilings, sender)
        )
        process.start()
        sender.close()
        trouble = ""
        while position < len(jobs) and not trouble:
            try:
                if not receiver.poll(plan.stall_s):
                    trouble = f"no answer in {plan.stall_s:g} s"
                    continue
                kind, message = receiver.recv()
            except EOFError:
                process.join()
                trouble = f"the process ended with {process.exitcode}"
                continue
            if kind == "facts":
                ceilings = message["ceilings"]
                on_facts(message)
            else:
                on_row(message)
                position += 1
        if not trouble:
            process.join(LEAVING_S)
        process.kill()
        process.join()
        if trouble and not ceilings:
            raise RuntimeError(f"no ceilings could be measured: {trouble}")
        if trouble:
            on_row(jobs[position] | {"failed": trouble})
            position += 1


def label(case: Case, provider: str) -> dict[str, Any]:
    """The head of a row."""
    return {"op": case.op, "case": case.label, "tokens": case.tokens, "provider": provider}


def work(
    plan: Plan,
    position: int,
    deadline: float | None,
    ceilings: dict[str, float],
    sender: Connection,
) -> None:
    """The jobs from `position` on; sends a row for each."""
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    if not ceilings:
        ceilings = measure_ceilings(device, plan.seconds)
        _free_memory(device)
        sender.send(("facts", {"ceilings": ceilings} | describe(device)))
    shared: tuple[Case | None, list[Expected] | str] = (None, "")
    for index, (case, name) in enumerate(plan.jobs()):
        if index < position:
            continue
        row = label(case, name)
        if deadline is not None and time.time() > deadline:
            sender.send(("row", row | {"failed": "not begun, the time was up"}))
            continue
        if shared[0] is None or shared[0].label != case.label or shared[0].op != case.op:
            shared = (None, "")
            torch._dynamo.reset()
            _free_memory(device)
            shared = (case, truth_of(case, device, dtype))
        expected = shared[1]
        row |= run_job(case, name, expected, device, dtype, plan, ceilings)
        sender.send(("row", row))
        try:
            synchronize(device)
        except Exception:
            # An illegal access: nothing works in this process any more.
            sender.close()
            os._exit(1)
    sender.close()


def truth_of(case: Case, device: torch.device, dtype: torch.dtype) -> list[Expected] | str:
    """The expected results, or why there are none."""
    try:
        return case.truth(make_inputs(case, device, dtype))
    except Exception as error:
        return f"no truth: {explain(error)}"
    finally:
        registry.configure(dict.fromkeys(registry.IMPLEMENTATIONS, registry.AUTO))


def run_job(
    case: Case,
    name: str,
    expected: list[Expected] | str,
    device: torch.device,
    dtype: torch.dtype,
    plan: Plan,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """Figures of one provider, or why there are none."""
    if isinstance(expected, str):
        return {"failed": expected}
    try:
        _free_memory(device)
        sets = make_sets(case, device, dtype)
        provider = case.providers[name]()
        times = (plan.seconds, plan.steady_s)
        return Measurement(case, provider, sets, expected, *times).run(ceilings)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": explain(error)}
    finally:
        registry.configure(dict.fromkeys(registry.IMPLEMENTATIONS, registry.AUTO))


def explain(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts = {"device": "cpu", "torch": torch.__version__}
    if device.type == "cuda":
        import triton

        facts |= {"device": torch.cuda.get_device_name(device), "triton": triton.__version__}
    return facts


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
