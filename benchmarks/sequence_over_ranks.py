"""Attention of both kinds over the ranks of a row: LASP+ and LASP, ring and gathered keys.

    torchrun --nproc-per-node 2 benchmarks/sequence_over_ranks.py [lengths=[32768,131072]] [...]

Forward and backward of the attention core, random inputs, one document over all ranks (the hardest
case), `length` tokens in all. `local` is lightning attention on a rank's tokens alone, with nothing
exchanged: what LASP+ takes longer than that is its price. Softmax attention is given as TFLOP/s a
rank, counting the causal half; both kinds keep Text-01's ratio of heads, but fewer of them, so that
a million tokens fit. The reply of each case is checked against one rank's at the shortest length.
Prints a JSON line a case, of the slowest rank's median.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from overlap import communication, profile_steps
from torch import Tensor

from fulmen.kernels.attention import softmax_attention
from fulmen.kernels.lightning import lightning_attention
from fulmen.models.layers import decay_slopes
from fulmen.parallel.lasp import PartAttention
from fulmen.parallel.rendezvous import join_world
from fulmen.parallel.sequence import RowPart
from fulmen.parallel.softmax import spread_attention

DEFAULTS = {
    "lengths": [32_768, 131_072, 524_288, 1_048_576],
    "kinds": ["lightning", "softmax"],
    "lightning_heads": 32,
    "softmax_heads": 8,
    "kv_heads": 1,
    "head_dim": 128,
    "dtype": "bfloat16",
    "seconds": 1.0,
    "profile": True,
}
FEWEST = 3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def lightning_cases(part: RowPart, slopes: Tensor, group: Any) -> dict[str, Attend]:
    def spread(variant: str) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return PartAttention(k, v, slopes, part, None, group, variant).finish(q, k, v)

        return attend

    return {
        "local": lambda q, k, v: lightning_attention(q, k, v, slopes)[0],
        "lasp_plus": spread("lasp_plus"),
        "lasp": spread("lasp"),
    }


def softmax_cases(part: RowPart, group: Any) -> dict[str, Attend]:
    def spread(ring: bool, balanced: bool) -> Attend:
        return lambda q, k, v: spread_attention(q, k, v, part, group, ring=ring, balanced=balanced)

    return {
        f"{name}{', balanced' if balanced else ''}": spread(name == "ring", balanced)
        for name in ("gather", "ring")
        for balanced in (False, True)
    }


class Bench:
    """What all cases share."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.device = join_world()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD
        self.on_gpu = self.device.type == "cuda"
        self.dtype = getattr(torch, options.dtype)
        dist.all_reduce(torch.zeros(1, device=self.device))

    def inputs(self, tokens: int, heads: int, kv_heads: int, seed: int) -> list[Tensor]:
        """q, k, v and the gradient of the output, of one rank."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(
                (1, tokens, n, self.options.head_dim),
                generator=generator,
                device=self.device,
                dtype=self.dtype,
            )
            for n in (heads, kv_heads, kv_heads, heads)
        ]

    def seconds(self, step: Callable[[], object]) -> float:
        """Median seconds of the slowest rank, all starting together."""
        times: list[float] = []
        budget = time.perf_counter() + self.options.seconds
        while True:
            dist.barrier()
            started = time.perf_counter()
            step()
            if self.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            done = torch.tensor(
                [float(len(times) >= FEWEST and time.perf_counter() > budget), times[-1]],
                device=self.device,
            )
            dist.all_reduce(done, op=dist.ReduceOp.MAX)
            stop, times[-1] = done.tolist()
            if stop:
                return statistics.median(times[1:])

    def check(self, kind: str, attend: Attend, heads: int, kv_heads: int, slopes: Tensor) -> float:
        """Largest error of output and gradients on 4096 tokens, over the largest value."""
        part = RowPart(self.rank, self.size, 4096 // self.size, (0, 4096))
        here = slice(part.first, part.first + part.tokens)
        *leaves, weight = self.inputs(4096, heads, kv_heads, 7)  # the same on every rank
        whole = [x.float().requires_grad_() for x in leaves]
        if kind == "lightning":
            out = lightning_attention(*whole, slopes)[0]
        else:
            out = softmax_attention(*whole)
        wanted = [out, *torch.autograd.grad(out, whole, weight.float())]
        mine = [x[:, here].clone().requires_grad_() for x in leaves]
        result = attend(*mine)
        got = [result, *torch.autograd.grad(result, mine, weight[:, here])]
        errors = [
            (a.float() - b[:, here]).abs().max() / b.abs().max()
            for a, b in zip(got, wanted, strict=True)
        ]
        worst = torch.stack(errors).max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()

    def run(self, kind: str, length: int) -> None:
        options = self.options
        tokens = length // self.size
        part = RowPart(self.rank, self.size, tokens, (0, length))
        heads = options.lightning_heads if kind == "lightning" else options.softmax_heads
        kv_heads = heads if kind == "lightning" else options.kv_heads
        slopes = decay_slopes(heads, 40, 80, self.device)
        small = RowPart(self.rank, self.size, 4096 // self.size, (0, 4096))
        if kind == "lightning":
            cases = lightning_cases(part, slopes, self.group)
            checked = lightning_cases(small, slopes, self.group)
        else:
            cases, checked = softmax_cases(part, self.group), softmax_cases(small, self.group)
        *leaves, gradient = self.inputs(tokens, heads, kv_heads, self.rank)
        for x in leaves:
            x.requires_grad_()
        for name, attend in cases.items():
            row: dict[str, Any] = {"kind": kind, "length": length, "ranks": self.size, "case": name}
            if name != "local":
                row["error"] = round(self.check(kind, checked[name], heads, kv_heads, slopes), 5)

            def step(attend: Attend = attend) -> object:
                return torch.autograd.grad(attend(*leaves), leaves, gradient)

            seconds = self.seconds(step)
            row["ms"] = round(1e3 * seconds, 3)
            if kind == "softmax":
                flops = 7 * length**2 * heads * options.head_dim / self.size
                row["tflops_per_rank"] = round(flops / seconds / 1e12, 1)
            if self.on_gpu and options.profile and name != "local" and seconds < 1:
                row |= communication(profile_steps(step, 3), 3)
            if self.rank == 0:
                print(json.dumps(row), flush=True)


def main() -> None:
    """Entry point."""
    bench = Bench(OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:])))
    for kind in bench.options.kinds:
        for length in bench.options.lengths:
            bench.run(kind, length)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
