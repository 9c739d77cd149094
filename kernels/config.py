"""The ops and what each can run on; without torch, which takes seconds to import."""

from dataclasses import dataclass, fields

AUTO = "auto"


@dataclass
class KernelsConfig:
    """The `kernels` group: implementation of each op; auto = the best that the machine has."""

    lightning: str = AUTO
    """Lightning attention: triton or torch."""
    attention: str = AUTO
    """Softmax attention: flash_attn_4, flash_attn_3, flash_attn_2, torch_varlen, cudnn, or sdpa."""
    attention_block: str = AUTO
    """Softmax attention on a part of the keys, for rows over ranks: flash, cudnn or torch."""
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
    """Rows to expert order, by sender to by expert, and the weighted sum back: triton or torch."""
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
    "attention_block": ("flash", "cudnn", "torch"),
    "grouped_gemm": ("grouped_mm", "triton", "torch"),
}
"""What each op can be asked to run on."""
