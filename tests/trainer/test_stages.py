"""The stages of a run: what holds when, and what the configuration refuses."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from support.folders import write_folder
from support.staged import staged_config, write_sources
from support.tiny import compose_config, text01_data, tiny_config

from fulmen.data.buckets import BUCKETS
from fulmen.data.config import SourceConfig
from fulmen.data.loader import PackedLoader
from fulmen.launch.hydra_main import explain, open_mappings
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.config import (
    PhaseConfig,
    RampConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    check_config,
    nearest_keys,
)
from fulmen.trainer.loop import Trainer
from fulmen.trainer.sources import check_stages
from fulmen.trainer.stages import (
    check_run,
    list_shares,
    list_stages,
    run_tokens,
    shares_at,
    stage_at,
    stage_config,
)

pytestmark = pytest.mark.fast


def staged() -> RunConfig:
    """Three stages: 1000 tokens of the run's own keys, then 2000 and 4000 of longer rows."""
    config = tiny_config("somewhere")
    config.data.sources = {
        "text": SourceConfig("somewhere", 3.0),
        "code": SourceConfig("elsewhere", 1.0),
        "qa": SourceConfig("there", 0.0),
    }
    constant = ScheduleConfig(warmup_steps=2, phases=[PhaseConfig(1, 0.5)])
    config.stages = {
        "first": StageConfig(tokens=1000, lengths={"short": 3, "medium": 1}),
        "middle": StageConfig(
            tokens=2000,
            seq_len=64,
            rope_theta=5e6,
            schedule=constant,
            lengths={"short": 1, "medium": 1, "long": 2},
            weights={"text": 1, "code": 1},
            transition_tokens=500,
            late_weights={"qa": 0.1},
            parallel={"cp": 2},
            trainer={"activation_checkpointing": "full"},
        ),
        "last": StageConfig(
            tokens=4000,
            seq_len=128,
            global_batch_tokens=512,
            micro_batch_tokens=128,
            transition_tokens=1000,
        ),
    }
    return config


def test_a_stage_has_its_values_in_place_of_the_runs() -> None:
    config = staged()
    first, middle, last = (stage_config(config, index) for index in range(3))
    assert first == config
    assert (middle.data.seq_len, middle.data.global_batch_tokens) == (64, 256)
    assert (middle.model.rope_theta, middle.parallel.cp) == (5e6, 2)
    assert middle.trainer.activation_checkpointing == "full"
    assert middle.schedule.warmup_steps == 2
    assert middle.stages == config.stages
    # Stages do not build on one another.
    assert (last.model.rope_theta, last.parallel.cp) == (10_000.0, 1)
    assert (last.data.seq_len, last.trainer.micro_batch_tokens) == (128, 128)
    assert last.schedule == config.schedule
    assert config.data.seq_len == 32  # a copy was changed


def test_stages_follow_each_other_by_tokens() -> None:
    config = staged()
    assert [(s.name, s.start, s.end) for s in list_stages(config)] == [
        ("first", 0, 1000),
        ("middle", 1000, 3000),
        ("last", 3000, 7000),
    ]
    tokens = [0, 999, 1000, 2999, 3000, 6999, 7000, 10**9]
    assert [stage_at(config, t) for t in tokens] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert run_tokens(config) == 7000
    config.trainer.max_tokens = 5000
    assert run_tokens(config) == 5000


def test_a_run_without_stages_is_one_of_its_own_keys() -> None:
    config = tiny_config("somewhere")
    (stage,) = list_stages(config)
    assert stage.config is config
    assert (stage.name, stage.start, stage.end) == ("", 0, 101_500)
    assert stage_at(config, 10**9) == 0
    shares = shares_at(config, 0)
    assert (shares.sources, shares.lengths) == ({"text": 1.0}, None)
    assert list_shares(config) == []


def test_learning_rate_and_batch_count_from_the_stages_start() -> None:
    config = staged()
    middle = config.stages["middle"]
    middle.schedule = ScheduleConfig(
        warmup_steps=4,
        phases=[PhaseConfig(1000, 0.5), PhaseConfig(1000, 0.25)],
        batch_ramp=[RampConfig(600, 512)],
    )
    stage = list_stages(config)[1]
    peak = config.optim.lr
    rates = [
        stage.learning_rate(step=step, tokens=tokens, first_step=7)
        for step, tokens in [(7, 1010), (10, 1900), (11, 1999), (12, 2000)]
    ]
    assert rates == pytest.approx([peak / 8, peak / 2, peak / 2, peak / 4])
    tokens = [1010, 1599, 1600, 2999, 3000, 5000]
    assert [stage.batch_tokens(t) for t in tokens] == [256, 256, 512, 512, 512, 512]


def shares(config: RunConfig, tokens: int) -> dict[str, float]:
    return shares_at(config, tokens).sources


def test_shares_go_linearly_over_the_transition_and_the_late_ones_are_exact() -> None:
    config = staged()
    assert shares(config, 0) == pytest.approx({"text": 0.75, "code": 0.25, "qa": 0})
    assert shares_at(config, 0).lengths == pytest.approx({"short": 0.75, "medium": 0.25, "long": 0})
    # Half-way, and at the end of the transition.
    assert shares(config, 1250) == pytest.approx({"text": 0.625, "code": 0.375, "qa": 0})
    half = {"short": 0.5, "medium": 0.25, "long": 0.25}
    assert shares_at(config, 1250).lengths == pytest.approx(half)
    assert shares(config, 1500) == pytest.approx({"text": 0.5, "code": 0.5, "qa": 0})
    assert shares(config, 2599) == pytest.approx({"text": 0.5, "code": 0.5, "qa": 0})
    late = {"text": 0.45, "code": 0.45, "qa": 0.1}
    assert shares(config, 2600) == pytest.approx(late)
    # The next stage begins where this one ends, so nothing jumps.
    assert shares(config, 3000) == pytest.approx(late)
    assert shares(config, 3500) == pytest.approx({"text": 0.6, "code": 0.35, "qa": 0.05})
    assert shares(config, 4000) == pytest.approx({"text": 0.75, "code": 0.25, "qa": 0})
    # The last stage has no choice by length, so there is nothing to go to.
    assert shares_at(config, 3500).lengths is None
    for tokens in range(0, 7000, 50):
        assert sum(shares(config, tokens).values()) == pytest.approx(1)


def test_a_transition_begins_at_what_the_stage_before_could_draw() -> None:
    config = staged()
    first, middle = config.stages["first"], config.stages["middle"]
    first.weights, first.lengths = {"text": 1}, {}
    middle.weights, middle.lengths = {"code": 1}, {"long": 1}
    # Perhaps only `code` has long documents, and at the first token it has no share yet.
    assert shares_at(config, 1000) == shares_at(config, 999)
    assert shares(config, 1000)["code"] == 0
    assert shares(config, 1001)["code"] > 0
    assert shares_at(config, 1001).lengths == {"short": 0, "medium": 0, "long": 1}


def test_the_shares_to_be_checked_are_those_of_every_stage() -> None:
    listed = list_shares(staged())
    assert [name for name, _ in listed] == ["first", "first", "middle", "middle", "last", "last"]
    assert listed[2][1].sources["qa"] == 0
    assert listed[3][1].sources["qa"] == 0.1


def test_text01_has_the_published_stages() -> None:
    config = compose_config(["recipe=text01", *text01_data()])
    stages = list_stages(config)
    assert [stage.config.data.seq_len for stage in stages] == [8192, 131_072, 524_288, 1_048_576]
    assert [stage.config.model.rope_theta for stage in stages] == [1e4, 5e6, 1e7, 1e7]
    assert [(stage.end - stage.start) // 10**9 for stage in stages] == [11_400, 300, 32, 26]
    table = [(0.3, 0.7, 0.0), (0.35, 0.35, 0.3), (0.3, 0.3, 0.4)]
    for stage, row in zip(stages[1:], table, strict=True):
        usual = shares_at(config, stage.start + (stage.end - stage.start) // 2)
        assert usual.lengths == pytest.approx(dict(zip(BUCKETS, row, strict=True)))
        assert usual.sources["long_qa"] == 0
        last_fifth = stage.end - (stage.end - stage.start) // 5
        assert shares(config, last_fifth)["long_qa"] == pytest.approx(0.1)
        assert shares(config, last_fifth - 1)["long_qa"] == 0
    check_run(config, 2048, all_here=True)
    assert [stage.config.parallel.cp for stage in stages] == [1, 8, 32, 64]


Change = Callable[[RunConfig], None]


def put(key: str, value: object) -> Change:
    """Set a field of the stage `middle`."""

    def change(config: RunConfig) -> None:
        setattr(config.stages["middle"], key, value)

    return change


def put_to_all(config: RunConfig) -> None:
    for stage in config.stages.values():
        stage.parallel = {"cp": 3}
        stage.micro_batch_tokens = 384
        stage.global_batch_tokens = 384


def rename(config: RunConfig) -> None:
    config.stages["128k"] = config.stages.pop("middle")


def begin_with_a_transition(config: RunConfig) -> None:
    config.stages["first"].transition_tokens = 5


MISTAKES = [
    (
        put("parallel", {"cpp": 2}),
        r"unknown key stages\.middle\.parallel\.cpp; did you mean .*\.cp",
    ),
    (put("parallel", {"cp": "two"}), r"stages\.middle\.parallel\.cp: Value 'two'"),
    (
        put("trainer", {"compil": True}),
        r"unknown key stages\.middle\.trainer\.compil; did you mean",
    ),
    (put("trainer", {"max_steps": 3}), r"stages\.middle\.trainer\.max_steps: not a key of a stage"),
    (put("parallel", {"timeout_s": 3.0}), r"stages\.middle\.parallel\.timeout_s: not a key of a"),
    (put("trainer", {"dtype": "float16"}), r"stages\.middle: trainer\.dtype=float16: must be one"),
    (put("seq_len", 48), r"stages\.middle: trainer\.micro_batch_tokens=64 is not a multiple of"),
    (put("global_batch_tokens", 100), r"stages\.middle: data\.global_batch_tokens=100 is not a mu"),
    (put("tokens", 255), r"stages\.middle\.tokens=255: must be at least a step's tokens, .*: 256"),
    (
        put("lengths", {"longer": 1}),
        r"unknown key stages\.middle\.lengths\.longer; known are short",
    ),
    (put("lengths", {"short": -1}), r"stages\.middle\.lengths\.short=-1: must be a number of 0"),
    (put("lengths", {"short": 0}), r"stages\.middle\.lengths: at least one share must be above 0"),
    (put("weights", {"txt": 1}), r"unknown key stages\.middle\.weights\.txt; known are text, code"),
    (put("late_weights", {"qua": 1}), r"unknown key stages\.middle\.late_weights\.qua; known are"),
    (put("late_weights", {"qa": 1.1}), r"stages\.middle\.late_weights .* 1\.1 together"),
    (put("late_weights", {"text": 0.4, "code": 0.4}), r"stages\.middle\.late_weights .* 0\.8 tog"),
    (put("late_from", 1.0), r"stages\.middle\.late_from=1\.0: must be between 0 and 1"),
    (
        put("transition_tokens", 1601),
        r"stages\.middle\.transition_tokens=1601: .* between 0 and 1600",
    ),
    (put("schedule", ScheduleConfig(warmup_steps=3)), r"stages\.middle\.schedule has no phases"),
    (
        put("schedule", ScheduleConfig(0, [PhaseConfig(0, 1.0)])),
        r"stages\.middle: schedule\.phases: ",
    ),
    (begin_with_a_transition, r"stages\.first\.transition_tokens: the first stage has nothing"),
    (rename, r"stages\.128k: a stage's name is letters"),
    (put_to_all, r"stages\.first: parallel\.cp=3 does not divide the 2 process"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_mistakes_are_told_with_their_stage(change: Change, message: str) -> None:
    config = staged()
    change(config)
    with pytest.raises(ValueError, match=message) as error:
        check_run(config, 2)
    assert "\n" not in str(error.value)


def test_other_stages_may_need_other_processes_but_must_be_possible() -> None:
    config = staged()
    check_run(config, 2, all_here=True)
    check_run(config, 1)  # for the first and the last
    with pytest.raises(ValueError, match=r"stages\.middle: parallel\.cp=2 does not divide the 1"):
        check_run(config, 1, all_here=True)
    with pytest.raises(ValueError, match=r"stages\.first: data\.global_batch_tokens=256 .* 3 data"):
        check_run(config, 3)
    config.stages["middle"].parallel = {"cp": 64, "ep": 4}
    check_run(config, 1)
    config.stages["middle"].parallel = {"cp": 96, "expert_zero_stage": 0}
    with pytest.raises(ValueError, match=r"stages\.middle: trainer\.micro_batch_tokens=64 is not"):
        check_run(config, 1)


def test_a_run_without_stages_is_checked_as_ever() -> None:
    config = tiny_config("somewhere")
    check_run(config, 2)
    with pytest.raises(ValueError, match=r"^data\.global_batch_tokens=256 .* 3 data-parallel"):
        check_run(config, 3)
    with pytest.raises(ValueError, match=r"^data\.global_batch_tokens=256 .* 3 data-parallel"):
        check_config(config, 3)


def test_stages_are_set_on_the_command_line() -> None:
    words = ["stages.to_128k.tokens=1000000000", "stages.to_128k.parallel.ep=1", "~stages.to_1m"]
    words += ["stages.to_512k.weights.corpus=2", "stages.to_512k.trainer.compile=true"]
    config = compose_config(
        ["recipe=text01", *text01_data(), *(open_mappings(word) for word in words)]
    )
    assert list(config.stages) == ["pretrain", "to_128k", "to_512k"]
    assert config.stages["to_128k"].tokens == 10**9
    assert config.stages["to_128k"].parallel == {"cp": 8, "ep": 1}
    assert config.stages["to_512k"].weights == {"corpus": 2.0}
    assert stage_config(config, 2).trainer.compile


def test_any_mapping_of_a_stage_is_open_on_the_command_line() -> None:
    words = ["health.spike_factor=20", "evaluation.reading.every_steps=3", "optim.lr=1e-5"]
    words += ["preference.beta=0.2", "optim.groups.text.lr_scale=0.5"]
    words = [f"stages.to_128k.{word}" for word in words]
    config = compose_config(
        ["recipe=text01", *text01_data(), *(open_mappings(word) for word in words)]
    )
    stage = config.stages["to_128k"]
    assert stage.health == {"spike_factor": 20}
    assert stage.evaluation["reading"] == {"every_steps": 3}
    assert (stage.optim["lr"], stage.preference["beta"]) == (1e-5, 0.2)
    assert stage.optim["groups"] == {"text": {"lr_scale": 0.5}}


@pytest.mark.parametrize("word", ["tokens=2", "parallel.cp=2", "health.spike_factor=20"])
def test_a_stage_that_is_not_there_is_named(word: str) -> None:
    word = f"stages.to_64k.{word}"
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        compose_config(["recipe=text01", *text01_data(), open_mappings(word)])
    key = word.partition("=")[0]
    said = explain(caught.value, RunConfig)
    assert said.startswith(f"unknown key {key}: the recipe has no entry of that name")


def test_what_a_later_stage_cannot_do_is_told_at_the_start(
    one_rank: torch.device, tmp_path: Path
) -> None:
    write_sources(tmp_path)
    config = staged_config(tmp_path)
    split: Any = SimpleNamespace(name="text", path="there", images=SimpleNamespace(longest=64))
    mesh = build_mesh(config.parallel, one_rank)
    check_stages(config, 1, [split], mesh)
    with pytest.raises(ValueError, match=r"stages\.start: data\.sources\.text: .* 64 tokens"):
        check_stages(config, 0, [split], mesh)
    config.stages["to_128"].evaluation = {"reading": {"every_steps": 3}}
    with pytest.raises(ValueError, match=r"stages\.to_128: reading: no source"):
        Trainer(config, mesh, tmp_path / "run")
    config.data.length_bounds = [500, 600]
    for name in ("to_64", "start"):  # a later one, and that which begins
        config.stages[name].lengths = {"long": 1}
        with pytest.raises(ValueError, match=rf"stages\.{name}: lengths\.long=1\.0: no source"):
            Trainer(config, mesh, tmp_path / "run")


def test_the_nearest_key_of_a_stage() -> None:
    assert nearest_keys("stages.to_1m.tokns", RunConfig)[0] == "stages.to_1m.tokens"
    assert (
        nearest_keys("stages.x.schedule.warmup", RunConfig)[0] == "stages.x.schedule.warmup_steps"
    )
    assert nearest_keys("stage", RunConfig)[0] == "stages"


def test_what_is_drawn_matches_the_table_of_each_stage(tmp_path: Path) -> None:
    chance = random.Random(0)

    def documents(count: int, lengths: list[int]) -> list[list[int]]:
        return [[1] * chance.choice(lengths) for _ in range(count)]

    config = staged()
    everything = [1, 7, 15, 16, 30, 47, 48, 100, 160]
    for name, count, lengths in [
        ("text", 900, everything),
        ("code", 300, everything),
        ("qa", 300, [9, 20, 60, 100]),
    ]:
        folder = write_folder(tmp_path / name, documents(count, lengths))
        config.data.sources[name].path = str(folder)
    config.stages = {
        "a": StageConfig(tokens=60_000),
        "b": StageConfig(
            tokens=100_000,
            seq_len=64,
            lengths={"short": 0.3, "medium": 0.7, "long": 0.0},
            weights={"text": 1, "code": 3},
            transition_tokens=20_000,
            late_weights={"qa": 0.1},
        ),
        "c": StageConfig(
            tokens=100_000,
            seq_len=128,
            micro_batch_tokens=128,
            lengths={"short": 0.35, "medium": 0.35, "long": 0.3},
            late_weights={"qa": 0.1},
        ),
    }
    state, tokens = None, 0
    account: dict[str, dict[str, int]] = {}
    for stage in list_stages(config):
        loader = PackedLoader(
            config.data.sources,
            seq_len=stage.config.data.seq_len,
            micro_batch_tokens=stage.config.trainer.micro_batch_tokens,
            batch_tokens=stage.batch_tokens,
            shares=partial(shares_at, config),
            length_bounds=(16, 48),
            seed=0,
            vocab_size=1000,
            prefetch_steps=0,
            state=state,
        )
        wanted: Counter[str] = Counter()
        start = tokens
        while tokens < stage.end:
            now = shares_at(config, tokens)
            batch = next(loader)
            for name, share in (*now.sources.items(), *(now.lengths or {}).items()):
                wanted[name] += share * batch.num_tokens
            tokens, state = tokens + batch.num_tokens, batch.state
        drawn: Counter[str] = Counter()
        for source, buckets in batch.state["account"].items():
            for bucket, count in buckets.items():
                new = count - account.get(source, {}).get(bucket, 0)
                drawn[source] += new
                drawn[bucket] += new
        account = batch.state["account"]
        assert sum(drawn[name] for name in config.data.sources) == tokens - start
        for name, count in wanted.items():
            # What was drawn and waits for a row, here and at the stage's start, is about a step.
            assert drawn[name] == pytest.approx(count, abs=0.01 * (tokens - start)), stage.name
        # A tenth of the last fifth, and what is left of it over the next transition.
        assert (drawn["qa"] > 0) == (stage.name != "a")
    assert sum(sum(buckets.values()) for buckets in account.values()) == tokens
