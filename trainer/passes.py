"""How often a step does each kind of work, by checkpointing policy and chunks.

In forward passes' worth. A backward pass is two, of softmax attention's core two and a half: it
computes the scores again. See parallel/checkpointing.py for what policies compute again.
"""

from dataclasses import dataclass, replace

from fulmen.trainer.config import RunConfig
from fulmen.trainer.sizes import sizes_of


@dataclass(frozen=True)
class Passes:
    """Of one micro-batch; the defaults are those of no checkpointing at all."""

    projections: int = 3
    experts: int = 3
    """And the router."""
    softmax_core: float = 3.5
    lightning_tensors: int = 11
    """That the core moves, `[tokens, heads, head_dim]` each; 4 of them forward."""
    attention_ops: int = 1
    """Forward passes of ops bound by memory in the attention half."""
    expert_ops: int = 1
    """Likewise of the expert half, but for the router's cast and the residual sum, which comes last
    and is not repeated."""
    casts: int = 1
    """Likewise of the router's cast."""
    rows: int = 2
    """Times that rows go to the experts and back, backward once."""
    keys: int = 2
    """Times that keys and values travel over cp, backward once."""
    states: int = 2
    """Likewise of lightning layers' states."""
    launches: float = 1.0
    """Of kernels, over those of a step without checkpointing or chunks."""


def count_passes(config: RunConfig) -> Passes:
    """What the configuration's policy makes of a forward and a backward pass."""
    policy, chunk = config.trainer.activation_checkpointing, config.trainer.chunk_tokens
    if chunk is not None:
        launches = 4 / 3 * -(-sizes_of(config).T // chunk)
        once = Passes(projections=4, experts=4, attention_ops=2, expert_ops=2, casts=2, rows=3)
        once = replace(once, launches=launches)
        if policy == "none":
            return once
        return replace(once, projections=5, lightning_tensors=15, attention_ops=3, states=3)
    if policy == "full":
        return Passes(4, 4, 4.5, 15, 2, 2, casts=2, rows=3, keys=3, states=3, launches=4 / 3)
    if policy == "none":
        return Passes()
    # Of some eighteen launches of a block's forward pass, five are norms, activations and the gate.
    selective = Passes(attention_ops=2, casts=2, launches=1.1)
    if config.parallel.cp > 1:
        # The cores are no torch ops there that could be kept.
        return replace(selective, softmax_core=4.5, lightning_tensors=15, keys=3, states=3)
    return selective
