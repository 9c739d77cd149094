"""Names and pictures that wandb, TensorBoard and the dashboard share: one name for one metric.

What is before the first slash of a name is its group, which both viewers fold by.
"""

from collections.abc import Mapping, Sequence

import numpy as np

GROUPS = {
    "aux_loss": "experts",
    "drop_rate": "experts",
    "expert_imbalance": "experts",
    "expert_load": "experts",
    "step_time_s": "speed",
    "data_wait_s": "speed",
    "checkpoint_stall_s": "speed",
    "tokens_per_s": "speed",
    "flops_per_token": "speed",
    "tflops_per_device": "speed",
    "mfu": "speed",
    "mfu_palm": "speed",
    "memory_gib": "speed",
    "skipped": "health",
    "rewinds": "health",
}
"""Group of a row's key; the others are of `train`, and a key with a slash brings its own."""
ALL_GROUPS = ("train", "loss", "eval", "grad_norm", "experts", "speed", "health", "tokens")
"""Every group that a chart's name can begin with."""

Load = Sequence[Sequence[float]]
_FAIR, _BUSY, _IDLE = (245, 245, 242), (178, 24, 43), (33, 102, 172)


def chart_name(key: str) -> str:
    """The name under which a row's value is shown."""
    return key if "/" in key else f"{GROUPS.get(key, 'train')}/{key}"


def chart_values(row: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a step's row by the names under which they are shown."""
    return {
        chart_name(key): value
        for key, value in row.items()
        if key not in ("step", "tokens") and isinstance(value, int | float)
    }


def chart_evaluation(values: Mapping[str, float]) -> dict[str, float]:
    """Held-out values and scores by the names under which they are shown."""
    return {f"eval/{name}": value for name, value in values.items()}


def draw_load(load: Load, cell: int = 1) -> np.ndarray:
    """A heat map of experts' loads, (layers * cell, experts * cell, 3) bytes of RGB.

    1 is a fair share and pale; no work is blue, four times as much as fair and more is red.
    """
    shares = np.asarray(load, dtype=np.float64)
    busy = np.log2(np.clip(shares, 1.0, 4.0))[..., None] / 2
    idle = 1.0 - np.clip(shares, 0.0, 1.0)[..., None]
    fair = np.array(_FAIR)
    colors = fair + busy * (np.array(_BUSY) - fair) + idle * (np.array(_IDLE) - fair)
    return colors.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
