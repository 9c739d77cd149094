"""How often a step does each kind of work, by checkpointing policy and chunks.

In forward passes' worth. A backward pass is two, of softmax attention's core two and a half: it
computes the scores again. See parallel/checkpointing.py for what policies compute again.
"""

from dataclasses import dataclass

from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import sizes_of


@dataclass(frozen=True)
class Passes:
    """Of one micro-batch."""

    projections: int
    experts: int
    """And the router."""
    softmax_core: float
    lightning_tensors: int
    """That the core moves, `[tokens, heads, head_dim]` each; 4 of them forward."""
    attention_again: int
    """Forward passes of ops bound by memory in the attention half."""
    experts_again: int
    """Likewise of the expert half."""
    exchanges_of_rows: int
    """Times that rows go to the experts and back, backward once."""
    exchanges_of_attention: int
    """Times that keys, values or states travel over cp, backward once."""
    chunks: int
    """Launches for one."""


def count_passes(config: RunConfig) -> Passes:
    """What the configuration's policy makes of a forward and a backward pass."""
    policy, chunk = config.trainer.activation_checkpointing, config.trainer.chunk_tokens
    if chunk is not None:
        again = 1 if policy == "full" else 0  # of the attention half, beside its chunks
        chunks = -(-sizes_of(config).T // chunk)
        return Passes(4 + again, 4, 3.5, 11 + 4 * again, 2 + again, 2, 3, 2 + again, chunks)
    if policy == "full":
        return Passes(4, 4, 4.5, 15, 2, 2, 3, 3, 1)
    if policy == "selective":
        # Lightning's core over cp is no torch op that could be kept.
        tensors = 15 if config.parallel.cp > 1 else 11
        return Passes(3, 3, 3.5, tensors, 2, 1, 2, 3, 1)
    return Passes(3, 3, 3.5, 11, 1, 1, 2, 2, 1)
