"""Learning rate and batch size, as functions of the step and the tokens trained so far.

In a run with stages both are counted from the stage's start: trainer/stages.py.
"""

from fulmen.trainer.config import PhaseConfig, RunConfig, ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, *, step: int, tokens: int) -> float:
    """Learning rate of the step that follows `step` steps and `tokens` tokens.

    Linear warm-up over the first `warmup_steps` steps, times the phase's factor. An exponential
    phase goes from the factor before it to its own, by an equal ratio per token; behind the last
    phase its final factor holds.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return peak * warmup * _phase_factor(schedule.phases, tokens)


def _phase_factor(phases: list[PhaseConfig], tokens: int) -> float:
    start, before = 0, phases[0].lr_factor
    for phase in phases:
        if tokens < start + phase.tokens:
            if phase.decay == "constant":
                return phase.lr_factor
            share = (tokens - start) / phase.tokens
            return before * (phase.lr_factor / before) ** share
        start, before = start + phase.tokens, phase.lr_factor
    return before


def batch_tokens(config: RunConfig, tokens: int) -> int:
    """Tokens of the optimiser step that follows `tokens` trained tokens."""
    size = config.data.global_batch_tokens
    for step in config.schedule.batch_ramp:
        if tokens >= step.from_tokens:
            size = step.global_batch_tokens
    return size


def batch_sizes(config: RunConfig) -> list[int]:
    """Tokens of a step, over the ramp."""
    ramp = [step.global_batch_tokens for step in config.schedule.batch_ramp]
    return [config.data.global_batch_tokens, *ramp]


def total_tokens(config: RunConfig) -> int:
    """Trained tokens at which the run ends, if no step limit ends it before."""
    if config.trainer.max_tokens is not None:
        return config.trainer.max_tokens
    return sum(phase.tokens for phase in config.schedule.phases)
