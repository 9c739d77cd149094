"""What can compute softmax attention: packages and torch's own kernels, their limits, their order.

All take `q` `[batch, tokens, heads, head_dim]`, and `k`, `v` with fewer heads and as many tokens or
more; the last query sees the last key. Boundaries `[documents + 1]` cut a packed row.
"""

import functools
import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

LONG_DOCUMENT = 16384
"""Mean length from which documents are worth a cuDNN call each; README.md counts it."""

TOO_LARGE = 2**31
"""Numbers of a tensor that cuDNN does not take."""

# Back end -> module, line that installs it.
PACKAGES = {
    "flash_attn_4": ("flash_attn.cute", 'pip install "flash-attn-4[cu13]"'),
    "flash_attn_3": (
        "flash_attn_interface",
        "pip install --no-build-isolation "
        '"git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper"',
    ),
    "flash_attn_2": ("flash_attn", "pip install --no-build-isolation flash-attn"),
}
# Back end -> major compute capabilities, largest head_dim.
_LIMITS = {
    "flash_attn_4": ((9, 10), 128),
    "flash_attn_3": ((9,), 256),
    "flash_attn_2": ((8, 9, 10, 12), 256),
    "torch_varlen": ((8, 9, 10, 12), 256),
    "cudnn": ((9, 10), 128),
}
# torch 2.11 takes fewer key and value heads without being told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def ranking(
    *, tokens: int, keys: int, documents: int, lengths_known: bool, compiling: bool
) -> list[str]:
    """All back ends, best first for a call of these sizes; README.md gives the reasons."""
    newest = ["flash_attn_4", "flash_attn_3"]
    if tokens == 1 < keys:
        # One query against a cache: SDPA spreads the keys over the multiprocessors.
        order = ["sdpa", "torch_varlen", *newest, "flash_attn_2", "cudnn"]
    elif tokens < keys:
        order = [*newest, "flash_attn_2", "torch_varlen", "sdpa", "cudnn"]
    elif documents == 1:
        order = [*newest, "cudnn", "flash_attn_2", "sdpa", "torch_varlen"]
    elif lengths_known and not compiling and tokens >= LONG_DOCUMENT * documents:
        order = [*newest, "cudnn", "flash_attn_2", "torch_varlen", "sdpa"]
    else:
        order = [*newest, "flash_attn_2", "torch_varlen", "cudnn", "sdpa"]
    if compiling:
        # FlashAttention 4's launches cannot be traced: they break the graph.
        order.remove("flash_attn_4")
        order.append("flash_attn_4")
    return order


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(
    name: str,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    head_dim: int,
    size: str = "",
) -> str:
    """Why a back end cannot take such tensors, or ""; size is "large" where even one key and value
    head's share of q has 2^31 numbers."""
    if name == "sdpa":
        return ""
    problem = _import_problem(name) if name in PACKAGES else ""
    if problem:
        return problem
    if device_type != "cuda":
        return "needs a CUDA tensor"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs bf16 or fp16"
    majors, largest_head_dim = _LIMITS[name]
    if head_dim % 8 or head_dim > largest_head_dim:
        return f"needs a head_dim that is a multiple of 8, up to {largest_head_dim}"
    if torch.cuda.get_device_capability(device_index)[0] not in majors:
        return f"needs compute capability {' or '.join(map(str, majors))}"
    if name == "torch_varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without flash attention"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if name == "cudnn" and size == "large":
        return "needs fewer than 2^31 numbers for each key and value head"
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    return ""


@functools.cache
def _import_problem(name: str) -> str:
    module, line = PACKAGES[name]
    try:
        if hasattr(importlib.import_module(module), "flash_attn_varlen_func"):
            return ""
        error = "no flash_attn_varlen_func in it"
    except Exception as raised:  # a package built for another torch raises anything
        error = str(raised)
    return f"{module} cannot be imported ({error}); this installs it: {line}"


def head_groups(numbers: int, kv_heads: int) -> int:
    """Parts of equal heads in which cuDNN takes a q of so many numbers; 0 if it does not."""
    fits = (n for n in range(1, kv_heads + 1) if not kv_heads % n and numbers // n < TOO_LARGE)
    return next(fits, 0)


def attend_with_sdpa(
    q: Tensor, k: Tensor, v: Tensor, host_cu_seqlens: Tensor | None, *, cudnn: bool
) -> Tensor:
    """`F.scaled_dot_product_attention`, one call per document.

    `cudnn` asks for cuDNN where it fits: as many keys as queries, two at least. Elsewhere cuDNN
    stays off, though torch would choose it on these GPUs: it builds a plan for each new length.
    """
    if host_cu_seqlens is None or not q.shape[1]:
        return _sdpa(q, k, v, cudnn)
    lengths = [length for length in host_cu_seqlens.diff().tolist() if length]
    parts = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([_sdpa(*part, cudnn) for part in parts], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cudnn: bool) -> Tensor:
    if cudnn and (groups := head_groups(q.numel(), k.shape[2])) > 1:
        # Copies: a view would still reach beyond 2^31 numbers.
        parts = zip(*(x.chunk(groups, dim=2) for x in (q, k, v)), strict=True)
        outputs = [
            _sdpa(a.contiguous(), b.contiguous(), c.contiguous(), cudnn) for a, b, c in parts
        ]
        return torch.cat(outputs, dim=2)
    tokens, keys = q.shape[1], k.shape[1]
    options: dict[str, Any] = {"enable_gqa": q.shape[2] != k.shape[2]}
    if tokens == keys:
        options["is_causal"] = True
    elif tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device)
        options["attn_mask"] = mask.tril(keys - tokens)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    fits = 1 < tokens == keys
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if cudnn and fits else _NOT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def attend_with_torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
) -> Tensor:
    """torch's variable-length attention: FlashAttention 2, unless
    `torch.nn.attention.activate_flash_attention_impl` put another one there."""
    batch, tokens = q.shape[:2]
    keys = k.shape[1]
    if cu_seqlens is None:
        cu_queries, cu_keys = _row_bounds(batch, tokens, q), _row_bounds(batch, keys, q)
        longest_queries, longest_keys = tokens, keys
    else:
        cu_queries = cu_keys = cu_seqlens
        longest_queries = longest_keys = max_seqlen
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output: Any = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_queries,
        cu_keys,
        # With 1 FlashAttention 2 takes a short cut for decoding, wrong beside empty documents.
        max(2, longest_queries),
        max(2, longest_keys),
        window_size=(-1, 0),
        **_GROUPED,
    )
    return output.unflatten(0, (batch, tokens))


def _row_bounds(batch: int, tokens: int, like: Tensor) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=like.device) * tokens


def attend_with_package(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
) -> Tensor:
    """One of PACKAGES; their functions share these keywords."""
    if name == "flash_attn_4":
        return _flash_attn_4(q, k, v, cu_seqlens, max_seqlen)
    if name == "flash_attn_3":
        import flash_attn_interface as package
    else:
        import flash_attn as package
    return _call_package(package, q, k, v, cu_seqlens, max_seqlen)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
) -> Tensor:
    import flash_attn.cute as package

    return _call_package(package, q, k, v, cu_seqlens, max_seqlen)


def _call_package(
    package: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    if cu_seqlens is None:
        result = package.flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        return result[0] if isinstance(result, tuple) else result
    longest = max(2, max_seqlen)  # as above
    result = package.flash_attn_varlen_func(
        q[0],
        k[0],
        v[0],
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
        deterministic=deterministic,
    )
    # Some versions return the log-sum-exp too.
    return (result[0] if isinstance(result, tuple) else result)[None]
