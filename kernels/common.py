"""What the ops share on the host; no import of Triton, so that a machine without it can choose."""

import functools

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
"""Of every Triton kernel."""
SHARED_BYTES_RESERVED = 2 * 2**10
"""A KiB that CUDA keeps of a program's, and one for reductions."""
NEEDS_CUDA = "needs a CUDA tensor"
"""The reason that is no news: CPU runs take the references."""


def why_not_dtype(*tensors: Tensor) -> str:
    """Why Triton kernels cannot take tensors of these types, or ""."""
    return "" if all(x.dtype in DTYPES for x in tensors) else "needs bf16 or fp32"


def why_not_triton(*tensors: Tensor) -> str:
    """The registry's reason: why Triton kernels cannot take these tensors, or ""."""
    return why_not_dtype(*tensors) if all(x.is_cuda for x in tensors) else NEEDS_CUDA


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """In which the references compute: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """`[rows, n]` with a row's numbers side by side: a view, or a copy where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@functools.cache
def num_processors(device: torch.device, without_gpu: int) -> int:
    """Multiprocessors of a GPU; `without_gpu` for the interpreter's chip."""
    if device.type != "cuda":
        return without_gpu
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_bytes(device: torch.device, most: int) -> int:
    """Shared memory of a multiprocessor that programs may use together, at most `most`."""
    if device.type != "cuda":
        return most
    whole: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return min(most, whole - SHARED_BYTES_RESERVED)
