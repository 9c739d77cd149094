"""The run configuration: a dataclass a Hydra group, and the checks that span groups."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fulmen.data.config import DataConfig
from fulmen.kernels.config import KernelsConfig
from fulmen.models.config import ModelConfig, MoEConfig, check_model
from fulmen.parallel.config import POLICIES, ParallelConfig, check_experts, check_parallel
from fulmen.trainer.health_config import HealthConfig, check_health
from fulmen.trainer.long_context.config import LongContextConfig, check_tasks
from fulmen.trainer.metrics import LogConfig
from fulmen.trainer.profile_config import ProfileConfig
from fulmen.trainer.reading.config import ReadingConfig, check_reading

Schema = TypeVar("Schema")
OBJECTIVES = ("language_modelling", "preference", "coca")
"""Values of `objective`; trainer/objective.py."""
LONGEST_S = 1e9
"""What torch counts in nanoseconds overflows ten times later."""


def _entries(key: str, given: Mapping[str, Any], kind: type[Schema]) -> dict[str, Schema]:
    """The values of a mapping as `kind`; of Any, as Hydra cannot add to one of dataclasses."""
    entries: dict[str, Schema] = {}
    for name, value in given.items():
        try:
            merged = OmegaConf.merge(OmegaConf.structured(kind), value)
            entries[name] = cast(Schema, OmegaConf.to_object(merged))
        except (OmegaConfBaseException, ValueError) as error:
            known = ", ".join(item.name for item in fields(kind))  # type: ignore[arg-type]
            reason = str(error).splitlines()[0]
            raise ValueError(f"{key}.{name}={value}: {reason}; its keys are {known}") from None
    return entries


@dataclass
class GroupConfig:
    """Parameters that train in another way than the rest, or not at all."""

    match: str = MISSING
    """Regular expression that the beginning of a parameter's name matches, so a prefix too."""
    lr_factor: float = 1.0
    """Learning rate over the run's."""
    weight_decay: float | None = None
    """Of the group's matrices; null = optim.weight_decay."""
    frozen: bool = False
    """Keep the weights as they are: no gradients, no moments."""


@dataclass
class OptimConfig:
    """The `optim` group: AdamW, gradient clipping and groups of parameters."""

    name: str = "adamw"
    """adamw (torch, fused) or apex_fused_adam (NVIDIA apex, when it is installed)."""
    lr: float = MISSING
    """Peak learning rate; the schedule multiplies it."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms have none."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; null = no clipping."""
    groups: dict[str, Any] = field(default_factory=dict)
    """Groups of parameters by a name of their own; of several that match, the first one counts."""

    def __post_init__(self) -> None:
        self.groups = _entries("optim.groups", self.groups, GroupConfig)


@dataclass
class PhaseConfig:
    """One phase of the learning rate, which begins where the one before it ends."""

    tokens: int = MISSING
    """Length of the phase."""
    lr_factor: float = MISSING
    """Learning rate over optim.lr: throughout, or at the end of a decay."""
    decay: str = "constant"
    """constant, or exponential: from the phase before it down to lr_factor."""


@dataclass
class RampConfig:
    """One step of the batch-size ramp."""

    from_tokens: int = MISSING
    """Trained tokens from which on it holds."""
    global_batch_tokens: int = MISSING
    """Tokens of one optimiser step."""


@dataclass
class ScheduleConfig:
    """The `schedule` group: learning rate and batch size over the run."""

    warmup_steps: int = 0
    """Steps of linear warm-up."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Phases of the learning rate by tokens; the run ends with the last."""
    batch_ramp: list[RampConfig] = field(default_factory=list)
    """Batch sizes that follow data.global_batch_tokens."""


@dataclass
class TrainerConfig:
    """The `trainer` group: how long, in what pieces, and in which precision."""

    max_steps: int | None = None
    """Optimiser steps; null = until max_tokens."""
    max_tokens: int | None = None
    """Trained tokens, without padding; null = the sum of schedule.phases."""
    micro_batch_tokens: int = MISSING
    """Tokens of one forward and backward pass on one data-parallel rank, padding included; the
    parallel.cp ranks of a row share them."""
    dtype: str = "bfloat16"
    """Of the forward and backward pass: bfloat16 or float32. Weights and sums are fp32."""
    activation_checkpointing: str = "none"
    """none, selective (norms and activation functions are computed again backward) or full (each
    block's input alone is kept)."""
    offload_checkpoints: bool = False
    """Keep the inputs that full checkpointing keeps in pinned host memory."""
    chunk_tokens: int | None = None
    """Tokens that go through experts and projections at a time, and again backward; null = all of
    a row's, once."""
    compile: bool = False
    """torch.compile each block."""
    allow_misfit: bool = False
    """Begin also where the planner says that the GPU's memory, or the disk, is not enough."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces of steps; also by a file, see docs/metrics.md."""


@dataclass
class CheckpointConfig:
    """The `checkpoint` group."""

    every_steps: int | None = None
    """Steps between checkpoints; null = only at the end."""
    keep: int = 3
    """Newest checkpoints to keep; older ones are deleted."""
    timeout_s: float = 1800.0
    """Time limit of a save in the background; the run ends loudly beyond it."""
    max_failures: int = 3
    """Saves in a row that fail, of a full disk for one, and end the run; the last save of a run has
    to work."""
    resume: str = "auto"
    """auto (the newest whole one of this run, if any), never, or a checkpoint folder."""
    tower: str | None = None
    """Checkpoint folder whose vision tower a run takes where it begins, such as one of vl01_vit."""


@dataclass
class PreferenceConfig:
    """The `preference` group, of what has objective=preference."""

    beta: float = 0.1
    """An answer's reward over by how much its log-probability is above the reference's."""
    patience: int | None = None
    """End after so many evaluations in turn without a lower held-out loss; null = never early."""
    min_improvement: float = 0.0
    """By how much, in nats per pair, a held-out loss has to be below the lowest one to count."""


@dataclass
class ZeroShotConfig:
    """A labelled folder by which a tower is judged (trainer/zero_shot.py)."""

    path: str = MISSING
    """Prepared folder whose captions are names of classes; its split `valid` is classified."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Texts in which {} is a class's name; their embeddings are averaged."""


@dataclass
class EvaluationConfig:
    """The `evaluation` group: loss on held-out documents, long texts, and images to read."""

    every_steps: int | None = None
    """Steps between evaluations, and one at the end of the run; null = none at all."""
    max_tokens: int = 1_000_000
    """Held-out tokens per source and evaluation."""
    long_context: LongContextConfig = field(default_factory=LongContextConfig)
    """Retrieval from long texts."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """Questions about held-out images."""
    zero_shot: dict[str, Any] = field(default_factory=dict)
    """Zero-shot classification of labelled folders, by a name of their own; for objective=coca."""

    def __post_init__(self) -> None:
        self.zero_shot = _entries("evaluation.zero_shot", self.zero_shot, ZeroShotConfig)


@dataclass
class StageConfig:
    """One stage of `stages`; what is null or empty in it is as in the run's own keys."""

    objective: str | None = None
    """In place of the run's objective."""
    tokens: int | None = None
    """Trained tokens; null = the sum of the phases of the stage's schedule."""
    seq_len: int | None = None
    """In place of data.seq_len."""
    rope_theta: float | None = None
    """In place of model.rope_theta."""
    global_batch_tokens: int | None = None
    """In place of data.global_batch_tokens."""
    micro_batch_tokens: int | None = None
    """In place of trainer.micro_batch_tokens."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """In place of schedule, if it has phases; counts steps and tokens from the stage's start."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Share of tokens by length bucket (short, medium, long), relative; empty = as they come."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of tokens by source, relative, 0 for those left out; empty = data.sources.*.weight."""
    transition_tokens: int = 0
    """Tokens over which the shares go linearly from the end of the stage before to these."""
    late_weights: dict[str, float] = field(default_factory=dict)
    """Sources that have exactly these shares of all tokens in the end of the stage."""
    late_from: float = 0.8
    """Part of the stage's tokens from which on late_weights hold."""
    parallel: dict[str, Any] = field(default_factory=dict)
    """Keys of `parallel` that differ."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keys of `trainer` that differ."""
    optim: dict[str, Any] = field(default_factory=dict)
    """Keys of `optim` that differ, also within `optim.groups`."""
    preference: dict[str, Any] = field(default_factory=dict)
    """Keys of `preference` that differ."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Keys of `evaluation` that differ."""
    health: dict[str, Any] = field(default_factory=dict)
    """Keys of `health` that differ."""


@dataclass
class RunConfig:
    """Everything that decides a run."""

    seed: int = 0
    """Of the initial weights and the order of the data."""
    run_root: str = "runs"
    """Folder of all runs; this one's is run_root/recipe/run_id."""
    run_id: str | None = None
    """Name of the run; null = the SLURM job's id, or the date and time."""
    objective: str = "language_modelling"
    """What is minimised: language_modelling (the next token's cross entropy), preference (DPO, on
    sources of pairs) or coca (a vision tower learns from captions)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in their order (trainer/stages.py); none = one, of the run's own keys."""


def to_dataclass(composed: Any, schema: type[Schema]) -> Schema:
    """A composed Hydra config as `schema`; `ValueError` naming the keys that were left out."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(
            f"no value for {', '.join(missing)}: set it in the recipe or on the command line"
        )
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)
    return config


def check_config(config: RunConfig, world_size: int) -> None:
    """Raise `ValueError`, naming the keys, for what can be told to fail before anything runs."""
    for key, value in _floats(asdict(config)):
        if not math.isfinite(value):
            raise ValueError(f"{key}={value}: must be a finite number")
    check_model(config.model, config.moe)
    check_parallel(config.parallel, world_size)
    check_experts(config.parallel, config.model, world_size)
    _check_choice("objective", config.objective, OBJECTIVES)
    _check_captioning(config)
    _check_choice("optim.name", config.optim.name, ["adamw", "apex_fused_adam"])
    _check_choice("trainer.dtype", config.trainer.dtype, ["bfloat16", "float32"])
    checkpointing = config.trainer.activation_checkpointing
    _check_choice("trainer.activation_checkpointing", checkpointing, POLICIES)
    _check_memory(config.trainer)
    for axis in ("cp", "ep", "etp"):
        if config.trainer.compile and getattr(config.parallel, axis) > 1:
            raise ValueError(
                f"trainer.compile=true does not go with parallel.{axis} above 1 yet: choose one of "
                "the two"
            )
    for phase in config.schedule.phases:
        _check_choice("schedule.phases[].decay", phase.decay, ["constant", "exponential"])
    if not config.schedule.phases:
        raise ValueError(
            "schedule.phases is empty: give at least one phase with tokens and lr_factor"
        )
    if config.schedule.phases[0].decay != "constant":
        raise ValueError("schedule.phases[0].decay: the first phase has nothing to decay from")
    if any(phase.tokens < 1 or phase.lr_factor <= 0 for phase in config.schedule.phases):
        raise ValueError("schedule.phases: tokens and lr_factor of each phase must be positive")
    starts = [step.from_tokens for step in config.schedule.batch_ramp]
    if starts != sorted(set(starts)) or any(start <= 0 for start in starts):
        raise ValueError(
            "schedule.batch_ramp: from_tokens must be positive and rise from step to step"
        )
    _check_ranges(config)
    if not config.data.sources:
        raise ValueError("data.sources is empty: name at least one prepared source and its path")
    _check_batches(config, world_size)
    check_groups(config.optim)
    check_health(config.health)
    _check_preference(config)
    long = config.evaluation.long_context
    key = "evaluation.long_context."
    check_tasks(long.tasks, long.lengths, long.depths, long.samples, key)
    check_reading(config.evaluation.reading, config.data.sources)


def _floats(tree: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(tree, float):
        yield key, tree
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for name, part in tree.items() if isinstance(tree, dict) else ():
        yield from _floats(part, f"{key}.{name}" if key else name)


def _check_preference(config: RunConfig) -> None:
    settings = config.preference
    if settings.beta <= 0:
        raise ValueError(f"preference.beta={settings.beta}: must be above 0")
    if settings.min_improvement < 0:
        raise ValueError(
            f"preference.min_improvement={settings.min_improvement}: must not be negative"
        )
    if settings.patience is not None and settings.patience < 1:
        raise ValueError(
            f"preference.patience={settings.patience}: must be at least 1, or null to train to the "
            "end"
        )
    if config.objective != "preference":
        return
    if config.parallel.cp > 1:
        raise ValueError(
            f"parallel.cp={config.parallel.cp} does not go with objective=preference: both answers "
            "of a pair lie in one row, which one rank holds whole; set parallel.cp=1 (in a stage: "
            "stages.NAME.parallel.cp=1)"
        )
    if settings.patience is not None and config.evaluation.every_steps is None:
        raise ValueError(
            f"preference.patience={settings.patience} counts evaluations, and there are none: set "
            "evaluation.every_steps (in a stage: stages.NAME.evaluation.every_steps), or "
            "preference.patience=null"
        )


def _check_captioning(config: RunConfig) -> None:
    is_captioner = config.model.coca is not None
    if is_captioner != (config.objective == "coca"):
        raise ValueError(
            f"objective={config.objective} does not go with model.coca "
            f"{'given' if is_captioner else 'null'}: a model with model.coca learns with "
            "objective=coca, and no other does"
        )
    if not is_captioner:
        if config.evaluation.zero_shot:
            raise ValueError("evaluation.zero_shot needs objective=coca")
        return
    for key, value in (
        ("parallel.cp", config.parallel.cp),
        ("parallel.ep", config.parallel.ep),
        ("parallel.etp", config.parallel.etp),
    ):
        if value != 1:
            raise ValueError(
                f"{key}={value}: objective=coca is data parallel alone, for captions are short and "
                "there are no experts: set it to 1"
            )
    long_context = config.evaluation.long_context.every_steps
    reading = config.evaluation.reading.every_steps
    for key, given in (
        ("trainer.compile", config.trainer.compile),
        ("trainer.chunk_tokens", config.trainer.chunk_tokens is not None),
        ("evaluation.long_context.every_steps", long_context is not None),
        ("evaluation.reading.every_steps", reading is not None),
        ("optim.groups.*.frozen", any(one.frozen for one in config.optim.groups.values())),
    ):
        if given:
            raise ValueError(f"{key} is not for objective=coca: leave it out")


def _check_memory(trainer: TrainerConfig) -> None:
    checkpointing = trainer.activation_checkpointing
    if trainer.compile and checkpointing != "none":
        raise ValueError(
            "trainer.compile=true does not go with trainer.activation_checkpointing="
            f"{checkpointing}: a block compiled anew for its second pass saves other tensors; "
            "choose one of the two"
        )
    if trainer.compile and trainer.chunk_tokens is not None:
        raise ValueError(
            "trainer.compile=true does not go with trainer.chunk_tokens: chunks are computed again "
            "by hand; choose one of the two"
        )
    if trainer.chunk_tokens is not None and checkpointing == "selective":
        raise ValueError(
            "trainer.chunk_tokens does not go with trainer.activation_checkpointing=selective, "
            "which would keep what chunks compute again: set it to full, or to none to keep the "
            "inputs and outputs of attention's cores"
        )
    if trainer.offload_checkpoints and checkpointing != "full":
        raise ValueError(
            "trainer.offload_checkpoints=true needs trainer.activation_checkpointing=full: it is "
            "the kept inputs that go to host memory"
        )


def _check_ranges(config: RunConfig) -> None:
    positive = {
        "optim.lr": config.optim.lr,
        "optim.eps": config.optim.eps,
        "optim.grad_clip": config.optim.grad_clip,
        "trainer.max_steps": config.trainer.max_steps,
        "trainer.max_tokens": config.trainer.max_tokens,
        "trainer.chunk_tokens": config.trainer.chunk_tokens,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.timeout_s": config.checkpoint.timeout_s,
        "checkpoint.max_failures": config.checkpoint.max_failures,
        "evaluation.every_steps": config.evaluation.every_steps,
        "evaluation.max_tokens": config.evaluation.max_tokens,
        "evaluation.long_context.every_steps": config.evaluation.long_context.every_steps,
        "evaluation.long_context.chunk_tokens": config.evaluation.long_context.chunk_tokens,
        "log.every_steps": config.log.every_steps,
        "parallel.timeout_s": config.parallel.timeout_s,
        "parallel.rendezvous_timeout_s": config.parallel.rendezvous_timeout_s,
    }
    optional = (
        "optim.grad_clip",
        "trainer.",
        "checkpoint.every_steps",
        "evaluation.every_steps",
        "evaluation.long_context.every_steps",
    )
    for key, value in positive.items():
        if value is not None and value <= 0:
            off = ", or null" if key.startswith(optional) else ""
            raise ValueError(f"{key}={value}: must be above 0{off}")
        if value is not None and key.endswith("timeout_s") and value > LONGEST_S:
            raise ValueError(f"{key}={value}: must be at most {LONGEST_S:.0e} seconds")
    not_negative = {
        "seed": config.seed,
        "schedule.warmup_steps": config.schedule.warmup_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "data.prefetch_steps": config.data.prefetch_steps,
        "data.image_workers": config.data.image_workers,
        "moe.aux_loss_coef": config.moe.aux_loss_coef,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{key}={value}: must not be negative")
    for key, value in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"optim.{key}={value}: must be at least 0 and below 1")


def check_groups(config: OptimConfig) -> None:
    """Raise `ValueError` for values of `optim.groups` that make no sense for any model."""
    for name, group in config.groups.items():
        key = f"optim.groups.{name}"
        try:
            re.compile(group.match)
        except re.error as error:
            raise ValueError(f"{key}.match={group.match}: no regular expression: {error}") from None
        if not group.lr_factor > 0:
            raise ValueError(
                f"{key}.lr_factor={group.lr_factor}: must be above 0; frozen=true keeps weights "
                "as they are"
            )
        if group.weight_decay is not None and group.weight_decay < 0:
            raise ValueError(f"{key}.weight_decay={group.weight_decay}: must not be negative")


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value}: must be one of {', '.join(choices)}")


def _check_batches(config: RunConfig, world_size: int) -> None:
    seq_len, micro = config.data.seq_len, config.trainer.micro_batch_tokens
    if seq_len < 1 or micro < 1 or micro % seq_len:
        raise ValueError(
            f"trainer.micro_batch_tokens={micro} is not a multiple of data.seq_len={seq_len}"
        )
    sizes = [("data.global_batch_tokens", config.data.global_batch_tokens)]
    for step in config.schedule.batch_ramp:
        sizes.append(("schedule.batch_ramp[].global_batch_tokens", step.global_batch_tokens))
    dp = world_size // config.parallel.cp
    for key, size in sizes:
        if size < 1 or size % (micro * dp):
            raise ValueError(
                f"{key}={size} is not a multiple of trainer.micro_batch_tokens={micro} times "
                f"{dp} data-parallel rank(s) = {micro * dp}: change one of them, or the number of "
                f"processes{_fitting_processes(config, [size for _, size in sizes])}"
            )
    if micro % config.parallel.cp:
        raise ValueError(
            f"trainer.micro_batch_tokens={micro} is not a multiple of "
            f"parallel.cp={config.parallel.cp}: change one of the two"
        )


def _fitting_processes(config: RunConfig, sizes: Sequence[int]) -> str:
    """The numbers of processes among which all batches divide, for a message."""
    micro, parallel = config.trainer.micro_batch_tokens, config.parallel
    whole = math.gcd(*(max(size, 0) for size in sizes))
    if whole % micro:
        return ""
    most = whole // micro
    split = parallel.ep * parallel.etp
    fits = [
        dp * parallel.cp
        for dp in range(1, most + 1)
        if most % dp == 0 and dp * parallel.cp % split == 0
    ]
    shown = ", ".join(map(str, fits[-8:]))
    return f" ({'..., ' if len(fits) > 8 else ''}{shown} would fit)" if fits else ""


def check_run_folder(folder: Path) -> None:
    """Raise `ValueError` if `folder` cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run folder {folder} cannot be written ({error.strerror}): set run_root to a folder "
            "where you may write"
        ) from None


def nearest_keys(unknown: str, schema: type) -> list[str]:
    """Keys of `schema` that look like `unknown`, best first."""
    if unknown.startswith("stages.") and unknown.count(".") > 1:
        # A stage's name is the user's own.
        stage, key = unknown.split(".", 2)[1:]
        return [f"stages.{stage}.{near}" for near in nearest_keys(key, StageConfig)]
    return difflib.get_close_matches(unknown, _all_keys(schema), n=3, cutoff=0.6)


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    hints = get_type_hints(schema)
    for item in fields(schema):  # type: ignore[arg-type]
        keys.append(prefix + item.name)
        if hints[item.name] == dict[str, StageConfig]:
            continue
        for kind in (hints[item.name], *get_args(hints[item.name])):
            if isinstance(kind, type) and is_dataclass(kind):
                keys.extend(_all_keys(kind, f"{prefix}{item.name}."))
    return keys
