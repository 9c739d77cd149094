"""Every Triton kernel of ours once, forward and backward, small and odd: for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py

Memory comes from the driver a tensor at a time, so that a step over the end of one is seen.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fulmen.kernels.cross_entropy.triton_cross_entropy import triton_linear_cross_entropy
from fulmen.kernels.gated_norm.triton_gated_norm import triton_gated_rms_norm
from fulmen.kernels.lightning import part
from fulmen.kernels.lightning.launch import triton_lightning_attention
from fulmen.kernels.moe.triton_experts import fused_grouped_swiglu
from fulmen.kernels.moe.triton_permute import triton_permutation, triton_permute, triton_unpermute
from fulmen.kernels.moe.triton_router import triton_route
from fulmen.kernels.moe.triton_segments import triton_transpose_segments
from fulmen.kernels.norm.triton_norm import triton_deepnorm, triton_rms_norm
from fulmen.kernels.rope.triton_rope import triton_rope
from fulmen.kernels.silu_qkv.triton_silu_qkv import triton_silu_qkv
from fulmen.kernels.swiglu.triton_swiglu import triton_swiglu


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def lightning(dtype: torch.dtype) -> list[Tensor]:
    """Packed and not, cut and not, with the states of rows."""
    results = []
    for bounds, piece_tokens in (
        (None, 0),
        (None, 64),
        ([0, 1, 1, 70, 200], 0),
        ([0, 77, 200], 64),
    ):
        q, k, v = (normal(1, 200, 2, 128, dtype=dtype) for _ in range(3))
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda").int()
        state = normal(1, 2, 128, 128, dtype=torch.float32)
        slopes = torch.tensor([0.1, 0.0], device="cuda")
        out, final = triton_lightning_attention(
            q, k, v, slopes, cu_seqlens, state, True, piece_tokens=piece_tokens
        )
        assert final is not None
        results += [out, final]
    return results


def experts(dtype: torch.dtype) -> list[Tensor]:
    x, logits = normal(53, 64, dtype=dtype), normal(53, 5, dtype=torch.float32)
    experts, weights, probabilities, _ = triton_route(logits, 2, 51)
    destinations, counts, num_kept = triton_permutation(experts, 5)
    w1, w3 = normal(5, 96, 64, dtype=dtype), normal(5, 96, 64, dtype=dtype)
    w2 = normal(5, 64, 96, dtype=dtype)
    rows = triton_permute(x, destinations, num_kept)
    rows = fused_grouped_swiglu(rows, counts, w1, w3, w2, "triton")
    return [triton_unpermute(rows, weights, destinations, num_kept), probabilities]


def parts(dtype: torch.dtype) -> list[Tensor]:
    """What a rank does with its part of a row: all passes and the sum of states, both ways."""
    results = []
    slopes = torch.tensor([0.1, 0.0], device="cuda")
    for bounds in (None, [0, 1, 70, 200]):
        q, k, v, d_out = (normal(1, 200, 2, 128, dtype=dtype).detach() for _ in range(4))
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda").int()
        last = slice(0 if bounds is None else bounds[-2], None)
        states = torch.stack([part.closing_state(k[:, last], v[:, last], slopes)] * 3)
        coming = torch.stack([part.opening_gradient(q[:, :70], d_out[:, :70], slopes)] * 3)
        entering = part.combine_states(states, slopes, 0, 3, 200, reverse=False)
        d_leaving = part.combine_states(coming, slopes, 1, 3, 200, reverse=True)
        out, kept = part.part_forward(q, k, v, slopes, cu_seqlens, entering)
        dq = part.part_backward_q(d_out, k, v, slopes, cu_seqlens, entering, kept)
        results += [out, dq]
        results += part.part_backward_kv(d_out, q, k, v, slopes, cu_seqlens, d_leaving, kept)
    sizes = torch.tensor([[3, 0, 20], [9, 20, 1]], device="cuda")
    return [*results, triton_transpose_segments(normal(61, 72, dtype=dtype), sizes)]


def others(dtype: torch.dtype) -> list[Tensor]:
    x, update, weight = normal(37, 2056, dtype=dtype), normal(37, 2056, dtype=dtype), normal(2056)
    angles = torch.rand(37, 16, device="cuda")
    labels = torch.randint(1003, (37,), device="cuda")
    labels[5] = -100
    return [
        triton_rms_norm(x, weight, 1e-6),
        triton_deepnorm(x, update, weight, 1e-6, alpha=3.0, beta=1.0),
        triton_gated_rms_norm(x, update, weight, 1e-6),
        triton_swiglu(x, update),
        *triton_silu_qkv(normal(1, 37, 3 * 3 * 64, dtype=dtype), 3),
        triton_rope(normal(1, 37, 3, 64, dtype=dtype), angles.cos(), angles.sin()),
        triton_linear_cross_entropy(
            normal(37, 64, dtype=dtype), normal(1003, 64, dtype=dtype), labels, z_loss=1e-4
        ),
    ]


def main() -> None:
    """Entry point."""
    if not torch.cuda.is_available():
        print("benchmarks/sanitize.py: no CUDA device here, nothing to run")
        return
    torch.manual_seed(0)
    groups: list[Callable[[torch.dtype], list[Tensor]]] = [lightning, parts, experts, others]
    for group in groups:
        for dtype in (torch.bfloat16, torch.float32):
            results = group(dtype)
            torch.stack([x.float().square().sum() for x in results]).sum().backward()
            torch.cuda.synchronize()
            finite = all(bool(x.isfinite().all()) for x in results)
            print(f"{group.__name__} {dtype}: {len(results)} results, finite {finite}", flush=True)
            if not finite:
                sys.exit(1)


if __name__ == "__main__":
    main()
