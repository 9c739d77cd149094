"""Layers of experts spread over ranks: their time, and the share of exchanges that is not hidden.

    torchrun --nproc-per-node 2 benchmarks/experts_over_ranks.py ep=2 [etp=1] [model=text01_1b]
        [layers=8]

Forward and backward of the experts of `layers` layers, one after the other, with random tokens and
routing: with several the host can run ahead of the device as far as it can in training. Three times
are taken for each number of token groups: the layers whole; their work alone, on as many rows that
are already there; their exchanges alone, sorting included. What the layers take longer than their
work is not hidden. On GPUs a profile of rank 0 says what of NCCL's time runs beside no other kernel
(`exchanges_ms`, `not_hidden_ms`), and how long others run (`work_ms`). Prints a JSON line each:
times of one layer, of the slowest rank's median.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from overlap import communication, profile_steps
from torch import Tensor
from torch.distributed.tensor import DTensor

from fulmen.kernels.moe import grouped_swiglu, route
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.moe import MoE
from fulmen.parallel import expert
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh, build_mesh
from fulmen.parallel.plan import spread_moe
from fulmen.parallel.rendezvous import join_world

DEFAULTS = {
    "model": "text01_1b",
    "tokens": 16384,
    "ep": 1,
    "etp": 1,
    "groups": [1, 2, 4],
    "capacity_factor": None,
    "layers": 1,
    "dtype": "bfloat16",
    "steps": 20,
    "warmup_steps": 5,
}
PROFILED_STEPS = 5


def build(config: ModelConfig, options: Any, mesh: Mesh, num_groups: int) -> MoE:
    """A layer whose experts have random weights."""
    with torch.device("meta"):
        layer = MoE(config, MoEConfig(capacity_factor=options.capacity_factor))
    spread_moe(layer, mesh, num_groups=num_groups)
    layer.experts.to(getattr(torch, options.dtype)).to_empty(device=mesh.device)
    for weight in layer.experts.parameters():
        local = weight.data
        (local.to_local() if isinstance(local, DTensor) else local).normal_(std=0.02)
    return layer


def time_of(step: Callable[[], None], options: Any, mesh: Mesh) -> float:
    """Median seconds a layer of the slowest rank."""
    times = []
    for _ in range(options.warmup_steps + options.steps):
        dist.barrier()
        started = time.perf_counter()
        step()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(times[options.warmup_steps :]), device=mesh.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item() / options.layers


def measure(config: ModelConfig, options: Any, mesh: Mesh, num_groups: int) -> dict[str, Any]:
    """The three times with one number of groups."""
    layers = [build(config, options, mesh, num_groups) for _ in range(options.layers)]
    generator = torch.Generator().manual_seed(mesh.rank)
    x = torch.randn(options.tokens, config.hidden_size, generator=generator)
    x = x.to(mesh.device, getattr(torch, options.dtype)).requires_grad_()
    logits = torch.randn(options.tokens, config.num_experts, generator=generator)
    routing = route(logits.to(mesh.device), config.num_experts_per_token)
    most_rows = layers[0]._most_rows(x)

    def whole() -> None:
        output = x
        for layer in layers:
            output = layer.experts(output, routing.experts, routing.weights, most_rows)
        output.backward(output.detach())

    held = layers[0].experts.parameters()
    weights = [w.to_local() if isinstance(w, DTensor) else w for w in held]
    rows = options.tokens * config.num_experts_per_token * mesh.etp
    share = torch.full((weights[0].shape[0],), rows // weights[0].shape[0], device=mesh.device)
    local = torch.randn(rows, config.hidden_size, dtype=x.dtype, device=mesh.device)
    parts = [part.requires_grad_() for part in local.chunk(num_groups)]

    def work() -> None:
        for part in parts * options.layers:
            output = grouped_swiglu(part, share // num_groups, *weights)
            output.backward(output.detach())

    times = {"layer_s": time_of(whole, options, mesh), "work_s": time_of(work, options, mesh)}
    expert.grouped_swiglu = _no_work
    times["exchanges_s"] = time_of(whole, options, mesh)
    expert.grouped_swiglu = grouped_swiglu
    profiled = {}
    if mesh.device.type == "cuda":
        repeats = PROFILED_STEPS * options.layers
        profiled = communication(profile_steps(whole, PROFILED_STEPS), repeats)
    not_hidden = max(0.0, times["layer_s"] - times["work_s"])
    return {
        "groups": num_groups,
        **{name: round(value, 6) for name, value in times.items()},
        "not_hidden": round(not_hidden / times["layer_s"], 4),
        **profiled,
    }


def _no_work(rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
    return rows.view_as(rows)


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    values = OmegaConf.to_container(OmegaConf.load(recipes / "model" / f"{options.model}.yaml"))
    config = ModelConfig(**values)
    mesh = build_mesh(ParallelConfig(ep=options.ep, etp=options.etp), join_world())
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu"
    for num_groups in options.groups:
        result = measure(config, options, mesh, num_groups)
        if mesh.rank == 0:
            ranks = {"ranks": mesh.world_size, "ep": mesh.ep, "etp": mesh.etp, "device": device}
            sizes = {"model": options.model, "tokens": options.tokens, "layers": options.layers}
            print(json.dumps({**sizes, **ranks, **result}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
