"""What benchmarks/kernels.py measures: for each op its shapes, providers, truth and cost."""

from kernel_cases import (
    attention,
    cross_entropy,
    experts,
    gated_norm,
    lightning,
    norm,
    permute,
    rope,
    router,
    silu_qkv,
    swiglu,
)
from kernel_cases.case import Case, Settings

OPS = {
    "lightning": lightning.cases,
    "attention": attention.cases,
    "silu_qkv": silu_qkv.cases,
    "norm": norm.cases,
    "gated_norm": gated_norm.cases,
    "rope": rope.cases,
    "swiglu": swiglu.cases,
    "router": router.cases,
    "permute": permute.cases,
    "experts": experts.cases,
    "cross_entropy": cross_entropy.cases,
}


def cases_of(op: str, settings: Settings) -> list[Case]:
    """All shapes of one op; nothing is allocated before a case's `make`."""
    if op not in OPS:
        raise ValueError(f"ops: no such op {op}; there are {', '.join(OPS)}")
    return OPS[op](settings)
