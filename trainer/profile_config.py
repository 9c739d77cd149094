"""When steps are traced; without torch, so that a configuration is checked at once."""

from dataclasses import dataclass

MAX_STEPS = 20
"""Of a trace: some hundred MB for a rank of a large model."""


@dataclass
class ProfileConfig:
    """The `trainer.profile` group: traces of a few steps, and memory at an out-of-memory."""

    from_step: int | None = None
    """First of the steps that are traced; null = none, until RUN/PROFILE is touched."""
    steps: int = 3
    """How many, at most 20."""
    ranks: int = 8
    """Ranks that write a trace, from rank 0 on."""
    memory_history: bool = False
    """Note where each piece of a GPU's memory is allocated, for the snapshot that is written when
    it runs out: about 2 microseconds an allocation."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"trainer.profile.steps={self.steps}: must be 1 to {MAX_STEPS}")
        for key in ("from_step", "ranks"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"trainer.profile.{key}={value}: must be 1 or more")
