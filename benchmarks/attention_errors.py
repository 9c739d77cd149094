"""How exact softmax attention's back ends are at the end of a long document, in bf16.

    python benchmarks/attention_errors.py [lengths=[8192,1048576]] [back_ends=[cudnn,torch_varlen]]

Only the last queries receive a gradient; they see every key. Output and gradients are compared with
fp64 on the same bf16 inputs: the norm of the error over the norm. A JSON line a case.
"""

import json
import sys

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fulmen.kernels import registry
from fulmen.kernels.attention import softmax_attention
from fulmen.kernels.attention.reference import reference_attention

DEFAULTS = {
    "lengths": [8192, 32768, 131072, 262144, 524288],
    "back_ends": ["cudnn", "torch_varlen"],
    "heads": 4,
    "kv_heads": 1,
    "head_dim": 128,
    "queries": 128,
    "scale": 1.0,
}


def errors(back_end: str, length: int, options: OmegaConf) -> dict[str, float]:
    """By result: output and the gradients of q, k and v."""
    registry.configure({"attention": back_end})
    torch.manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    *leaves, gradient = (
        options.scale * torch.randn(1, length, n, options.head_dim, device="cuda").bfloat16()
        for n in heads
    )
    for x in leaves:
        x.requires_grad_()
    last = slice(length - options.queries, None)
    gradient[:, : last.start] = 0
    output = softmax_attention(*leaves)
    mine = (output[:, last], *torch.autograd.grad(output, leaves, gradient))
    exact = [x.detach().double() for x in (leaves[0][:, last], *leaves[1:])]
    for x in exact:
        x.requires_grad_()
    wanted = reference_attention(*exact)
    theirs = (wanted, *torch.autograd.grad(wanted, exact, gradient[:, last].double()))

    def apart(a: Tensor, b: Tensor) -> float:
        return float(f"{((a.double() - b).norm() / b.norm()).item():.1e}")

    q, *others = mine[1:]
    pairs = zip(("o", "dq", "dk", "dv"), (mine[0], q[:, last], *others), theirs, strict=True)
    return {name: apart(a, b) for name, a, b in pairs}


def main() -> None:
    """Entry point."""
    options = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli(sys.argv[1:]))
    for length in options.lengths:
        for back_end in options.back_ends:
            row = {"back_end": back_end, "length": length}
            try:
                row |= errors(back_end, length, options)
            except (torch.OutOfMemoryError, ValueError) as error:
                row["failed"] = str(error).splitlines()[0][:200]
            print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
