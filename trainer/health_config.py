"""What is done about bad steps; without torch, so that a configuration is checked at once."""

from dataclasses import dataclass

ON_DISAGREEMENT = ("stop", "rewind")


@dataclass
class HealthConfig:
    """The `health` group: bad steps are skipped, and replicas compared (trainer/health.py)."""

    enabled: bool = True
    """false = none of this: a gradient norm that is not finite stops the run."""
    spike_factor: float | None = None
    """A step is bad too whose gradient norm is above so many times the median of good steps, or
    whose loss is above their median by so many median absolute deviations, of at least 1 % of it;
    null = only a step that is not finite."""
    window: int = 100
    """Good steps that medians are taken over, and steps in which bad ones are counted."""
    max_skips: int = 5
    """Bad steps in a window that are skipped; with one more the run goes back to a checkpoint."""
    max_rewinds: int = 3
    """Times that a run goes back; then it stops."""
    replicas_every_steps: int | None = 100
    """Steps from one comparison of replicas to the next; null = only before each checkpoint."""
    on_disagreement: str = "stop"
    """stop, or rewind to the newest checkpoint, where replicas differ."""


def check_health(config: HealthConfig) -> None:
    """Raise `ValueError`, naming the key, for values that make no sense."""
    if config.spike_factor is not None and not config.spike_factor > 1:
        raise ValueError(
            f"health.spike_factor={config.spike_factor}: must be above 1, or null to skip only "
            "steps that are not finite"
        )
    if config.window < 1:
        raise ValueError(f"health.window={config.window}: must be 1 or more")
    for key in ("max_skips", "max_rewinds"):
        if getattr(config, key) < 0:
            raise ValueError(f"health.{key}={getattr(config, key)}: must not be negative")
    if config.max_skips >= config.window:
        raise ValueError(
            f"health.max_skips={config.max_skips}: must be below health.window={config.window}, in "
            "which they are counted"
        )
    every = config.replicas_every_steps
    if every is not None and every < 1:
        raise ValueError(f"health.replicas_every_steps={every}: must be above 0, or null")
    if config.on_disagreement not in ON_DISAGREEMENT:
        raise ValueError(
            f"health.on_disagreement={config.on_disagreement}: must be one of "
            f"{', '.join(ON_DISAGREEMENT)}"
        )
