"""What the configuration refuses, and that every message names the key."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.tiny import tiny_config

from fulmen.trainer.config import (
    PhaseConfig,
    RampConfig,
    RunConfig,
    check_config,
    check_run_folder,
    nearest_keys,
    to_dataclass,
)

pytestmark = pytest.mark.fast

Change = Callable[[RunConfig], None]


def put(key: str, value: object) -> Change:
    """Set `group.name`, or a key without a group, to a value."""

    def change(config: RunConfig) -> None:
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value)

    return change


def ramp(*steps: tuple[int, int]) -> Change:
    return put("schedule.batch_ramp", [RampConfig(start, size) for start, size in steps])


def compile_with(axis: str) -> Change:
    """Compiled blocks beside an axis of two ranks."""

    def change(config: RunConfig) -> None:
        config.trainer.compile = True
        setattr(config.parallel, axis, 2)

    return change


def together(**values: object) -> Change:
    """Several keys of the trainer."""

    def change(config: RunConfig) -> None:
        for key, value in values.items():
            setattr(config.trainer, key, value)

    return change


def compile_and_checkpoint(config: RunConfig) -> None:
    config.trainer.compile = True
    config.trainer.activation_checkpointing = "full"


MISTAKES = [
    (put("model.num_layers", 0), r"model\.num_layers=0: must be at least 1"),
    (put("model.num_attention_heads", 3), r"model\.num_attention_heads=3: must be a power of two"),
    (put("model.num_key_value_heads", 4), r"num_attention_heads=2 is not a multiple of .*heads=4"),
    (put("model.rotary_dim", 7), r"model\.rotary_dim=7: must be even"),
    (put("model.rotary_dim", 18), r"model\.rotary_dim=18: .* model\.head_dim=16"),
    (put("model.num_experts_per_token", 5), r"num_experts_per_token=5 exceeds model\.num_exp.*=4"),
    (put("model.rope_theta", 0.0), r"model\.rope_theta=0\.0: must be above 0"),
    (put("model.rms_norm_eps", -1e-5), r"model\.rms_norm_eps=-1e-05: must be above 0"),
    (put("model.softmax_every", -1), r"model\.softmax_every=-1"),
    (put("moe.capacity_factor", 0.0), r"moe\.capacity_factor=0\.0: must be positive, or null"),
    (put("moe.global_router", True), r"moe\.global_router=true .* moe\.capacity_factor is null"),
    (put("moe.aux_loss_scope", "row"), r"moe\.aux_loss_scope=row: must be one of micro_batch, gl"),
    (put("moe.capacity_factor", math.inf), r"^moe\.capacity_factor=inf: must be a finite number"),
    (put("optim.lr", math.nan), r"^optim\.lr=nan: must be a finite number"),
    (
        put("schedule.phases", [PhaseConfig(10, math.nan)]),
        r"^schedule\.phases\.0\.lr_factor=nan: must be a finite number",
    ),
    (put("seed", -1), r"^seed=-1: must not be negative"),
    (put("parallel.cp", 3), r"parallel\.cp=3 does not divide"),
    (put("parallel.ep", 3), r"parallel\.ep=3 x parallel\.etp=1 does not divide the 2 process"),
    *[
        (compile_with(axis), rf"trainer\.compile=true does not go with parallel\.{axis} above 1")
        for axis in ("cp", "ep", "etp")
    ],
    (put("parallel.zero_stage", 4), r"parallel\.zero_stage=4: must be 0, 1, 2 or 3"),
    (put("optim.name", "sgd"), r"optim\.name=sgd: must be one of adamw, apex_fused_adam"),
    (put("trainer.dtype", "float16"), r"trainer\.dtype=float16: must be one of bfloat16, float32"),
    (
        put("trainer.activation_checkpointing", "some"),
        r"trainer\.activation_checkpointing=some: must be one of none, selective, full",
    ),
    (compile_and_checkpoint, r"trainer\.compile=true does not go with trainer\.activation_check"),
    (
        together(compile=True, chunk_tokens=32),
        r"trainer\.compile=true does not go with trainer\.chunk_tokens",
    ),
    (
        together(activation_checkpointing="selective", chunk_tokens=32),
        r"trainer\.chunk_tokens does not go with .*=selective",
    ),
    (
        together(activation_checkpointing="selective", offload_checkpoints=True),
        r"trainer\.offload_checkpoints=true needs trainer\.activation_checkpointing=full",
    ),
    (put("trainer.chunk_tokens", 0), r"trainer\.chunk_tokens=0: must be above 0, or null"),
    (put("schedule.phases", []), r"schedule\.phases is empty"),
    (
        put("schedule.phases", [PhaseConfig(10, 1.0, "linear")]),
        r"schedule\.phases\[\]\.decay=linear: must be one of constant, exponential",
    ),
    (
        put("schedule.phases", [PhaseConfig(10, 0.1, "exponential")]),
        r"schedule\.phases\[0\]\.decay: the first phase has nothing to decay from",
    ),
    (put("schedule.phases", [PhaseConfig(0, 1.0)]), r"schedule\.phases: .* must be positive"),
    (put("schedule.phases", [PhaseConfig(10, 0.0)]), r"schedule\.phases: .* must be positive"),
    (ramp((0, 256)), r"schedule\.batch_ramp: from_tokens must be positive"),
    (ramp((200, 256), (100, 512)), r"schedule\.batch_ramp: .* rise from step to step"),
    (ramp((100, 256), (100, 512)), r"schedule\.batch_ramp: .* rise from step to step"),
    (put("checkpoint.keep", 0), r"checkpoint\.keep=0: must be above 0$"),
    (put("parallel.timeout_s", 0.0), r"parallel\.timeout_s=0\.0: must be above 0$"),
    (
        put("checkpoint.timeout_s", 1e10),
        r"checkpoint\.timeout_s=1.*: must be at most 1e\+09 seconds",
    ),
    (put("optim.grad_clip", 0.0), r"optim\.grad_clip=0\.0: must be above 0, or null"),
    (put("optim.lr", -1.0), r"optim\.lr=-1\.0: must be above 0"),
    (put("optim.beta2", 1.0), r"optim\.beta2=1\.0: must be at least 0 and below 1"),
    (put("checkpoint.every_steps", 0), r"checkpoint\.every_steps=0: must be above 0, or null"),
    (put("evaluation.every_steps", 0), r"evaluation\.every_steps=0: must be above 0, or null"),
    (put("trainer.max_tokens", 0), r"trainer\.max_tokens=0: must be above 0, or null"),
    (put("schedule.warmup_steps", -3), r"schedule\.warmup_steps=-3: must not be negative"),
    (put("data.sources", {}), r"data\.sources is empty"),
    (
        put("trainer.micro_batch_tokens", 48),
        r"trainer\.micro_batch_tokens=48 is not a multiple of data\.seq_len=32",
    ),
    (put("trainer.micro_batch_tokens", 0), r"trainer\.micro_batch_tokens=0 is not a multiple"),
    (put("data.seq_len", 0), r"data\.seq_len=0"),
    (
        put("data.global_batch_tokens", 320),
        r"data\.global_batch_tokens=320 is not a multiple of trainer\.micro_batch_tokens=64 times "
        r"2 data-parallel rank\(s\) = 128: .* number of processes",
    ),
    (put("data.global_batch_tokens", 0), r"data\.global_batch_tokens=0 is not a multiple"),
    (ramp((10, 320)), r"schedule\.batch_ramp\[\]\.global_batch_tokens=320 is not a multiple"),
]


def test_the_tiny_run_is_valid() -> None:
    for world_size in (1, 2, 4):
        check_config(tiny_config("somewhere"), world_size)


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_mistakes_are_told_by_key(change: Change, message: str) -> None:
    config = tiny_config("somewhere")
    change(config)
    with pytest.raises(ValueError, match=message) as error:
        check_config(config, 2)
    assert "\n" not in str(error.value)


def test_the_batch_is_held_against_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"data\.global_batch_tokens=256 .* 3 data-parallel"):
        check_config(tiny_config("somewhere"), 3)


def test_missing_keys_are_named() -> None:
    composed = OmegaConf.structured(RunConfig)
    with pytest.raises(ValueError, match="no value for ") as error:
        to_dataclass(composed, RunConfig)
    named = str(error.value)
    for key in ("model.hidden_size", "data.seq_len", "optim.lr", "trainer.micro_batch_tokens"):
        assert key in named
    assert "model.rope_theta" not in named


def test_a_structured_config_comes_back_as_dataclasses() -> None:
    config = tiny_config("somewhere")
    assert to_dataclass(OmegaConf.structured(config), RunConfig) == config


@pytest.mark.parametrize(
    ("unknown", "known"),
    [
        ("model.hidden_sise", "model.hidden_size"),
        ("model.num_expert", "model.num_experts"),
        ("optim.learning_rate", None),
        ("optim.weight_dacay", "optim.weight_decay"),
        ("trainer.max_step", "trainer.max_steps"),
        ("paralel.zero_stage", "parallel.zero_stage"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("log.wanb", "log.wandb"),
        ("data.sequence_len", "data.seq_len"),
        ("sed", "seed"),
        ("schedule.phases.token", "schedule.phases.tokens"),
    ],
)
def test_the_nearest_key_comes_first(unknown: str, known: str | None) -> None:
    near = nearest_keys(unknown, RunConfig)
    if known is None:
        assert len(near) <= 3
    else:
        assert near[0] == known


def test_nothing_is_near_to_nonsense() -> None:
    assert nearest_keys("zzzzqqqq", RunConfig) == []


def test_a_run_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "recipe" / "name"
    check_run_folder(folder)
    assert os.listdir(folder) == []
    check_run_folder(folder)


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run folder .*file/name cannot be written .*run_root"):
        check_run_folder(tmp_path / "file" / "name")
