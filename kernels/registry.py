"""Which implementation of an op runs: the best that the machine has, unless configuration says.

Every op lists its implementations, best first, each with the reason why it cannot take the call.
The choice is logged once. `kernels.<op>=<implementation>` in a run's configuration overrides it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

log = logging.getLogger("fulmen.kernels")

AUTO = "auto"


@dataclass
class KernelsConfig:
    """The `kernels` group: implementation of each op; auto = the best that the machine has."""

    lightning: str = AUTO
    """Lightning attention: triton or torch."""
    attention: str = AUTO
    """Softmax attention: flash_attn_4, flash_attn_3, flash_attn_2, torch_varlen, cudnn, or sdpa."""
    silu_qkv: str = AUTO
    """SiLU on q, k and v with the split by head: triton or torch."""
    norm: str = AUTO
    """RMSNorm, alone or with the DeepNorm residual: triton or torch."""
    gated_norm: str = AUTO
    """RMSNorm times sigmoid gate: triton or torch."""
    rope: str = AUTO
    """Rotary embedding: triton or torch."""
    swiglu: str = AUTO
    """SiLU of the gate times the up projection: triton or torch."""
    router: str = AUTO
    """Softmax over experts, top-k, counts: triton or torch."""
    permute: str = AUTO
    """Rows to expert order and their weighted sum back: triton or torch."""
    grouped_gemm: str = AUTO
    """Products of each expert's rows with its matrix: grouped_mm, triton, or torch (a loop)."""
    cross_entropy: str = AUTO
    """Head and cross entropy: triton or torch."""


_OURS = ("triton", "torch")
IMPLEMENTATIONS = {item.name: _OURS for item in fields(KernelsConfig)} | {
    "attention": (
        "flash_attn_4",
        "flash_attn_3",
        "flash_attn_2",
        "torch_varlen",
        "cudnn",
        "sdpa",
    ),
    "grouped_gemm": ("grouped_mm", "triton", "torch"),
}
"""What each op can be asked to run on."""

# One process trains one model: what was asked for, and what was already logged, hold for all of it.
_overrides: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


def configure(choices: Mapping[str, str]) -> None:
    """Ask for implementations by op; `auto` takes back an earlier request.

    Raises:
        ValueError: an unknown name. Whether the machine has it shows when the op first runs.
    """
    for op, name in choices.items():
        if op not in IMPLEMENTATIONS:
            raise ValueError(f"kernels.{op}: no such op; there are {', '.join(IMPLEMENTATIONS)}")
        if name not in (AUTO, *IMPLEMENTATIONS[op]):
            raise ValueError(
                f"kernels.{op}={name}: must be auto or one of {', '.join(IMPLEMENTATIONS[op])}"
            )
        if name == AUTO:
            _overrides.pop(op, None)
        else:
            _overrides[op] = name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(op: str, *candidates: tuple[str, str]) -> str:
    """Name of the implementation to run.

    Args:
        op: a name of OPS.
        candidates: (implementation, why it cannot take this call or ""), best first.

    Raises:
        ValueError: the configured implementation cannot take the call, or none can.
    """
    assert {name for name, _ in candidates} <= set(IMPLEMENTATIONS[op])
    wanted = _overrides.get(op)
    if wanted is not None:
        reasons = dict(candidates)
        if reasons.get(wanted):
            raise ValueError(f"kernels.{op}={wanted}: {reasons[wanted]}")
        name = wanted
    else:
        usable = [name for name, reason in candidates if not reason]
        if not usable:
            raise ValueError(f"{op}: " + "; ".join(f"{name}: {why}" for name, why in candidates))
        name = usable[0]
    if (op, name) not in _logged:
        _logged.add((op, name))
        log.info("kernels: %s runs on %s%s", op, name, " (configured)" if wanted else "")
    return name
