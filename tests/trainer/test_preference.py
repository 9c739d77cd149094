"""DPO against a hand-written reference in fp64, and stages of preference as runs."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.meta import LiveBytes, use_kernels_of_a_gpu
from support.pairs import preference_config, prepare_pairs
from support.tiny import compose_config, read_checkpoint
from support.worlds import run_world
from torch import Tensor

from fulmen.data.image_batches import decode_images, normalise_tiles, undecoded
from fulmen.data.image_decoding import ImageDecoder
from fulmen.data.image_shards import CHOSEN
from fulmen.data.shards import PreparedSplit
from fulmen.models.image_layout import place_images
from fulmen.models.init import init_model
from fulmen.models.preference import document_cross_entropy, preference_loss
from fulmen.models.text import Head, TextModel
from fulmen.models.vl import Images, build_model
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh, release_groups
from fulmen.trainer import reference as reference_module
from fulmen.trainer.checkpoint import STATE_FILE
from fulmen.trainer.config import PhaseConfig, RunConfig, ScheduleConfig, StageConfig
from fulmen.trainer.head_memory import head_bytes, head_scratch
from fulmen.trainer.loop import Trainer
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.planner import GPUS, Assumptions, describe, make_plan
from fulmen.trainer.reference import KEY, compute_reference
from fulmen.trainer.run import give_back, open_stage
from fulmen.trainer.stages import check_run

BETA = 0.3
TIMES = (
    *("step_time_s", "data_wait_s", "checkpoint_stall_s", "tokens_per_s"),
    *("tflops_per_device", "memory_gib"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_pairs(tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_world(run_jobs, 1, [(preference_config(data), folder)])
    return folder


def run_jobs(device: torch.device, jobs: list[tuple[RunConfig, Path]]) -> None:
    for config, folder in jobs:
        fit(config, device, folder)
        release_groups()


def fit(config: RunConfig, device: torch.device, folder: Path) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, build_mesh(config.parallel, device), folder)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    read = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read]


# The formula


@pytest.mark.fast
def test_the_loss_and_its_gradient() -> None:
    policy = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, 2, dtype=torch.float64)
    found = preference_loss(policy, reference, beta=BETA)
    differences = policy - reference
    margins = BETA * (differences[:, 0] - differences[:, 1])
    loss = torch.log1p(torch.exp(-margins)).sum()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.reward_margin, margins.sum().detach())
    torch.testing.assert_close(found.chosen_log_ratio, differences[:, 0].sum().detach())
    torch.testing.assert_close(found.rejected_log_ratio, differences[:, 1].sum().detach())
    assert found.reward_accuracy == sum(bool(margin > 0) for margin in margins)
    ours, theirs = (torch.autograd.grad(one, policy)[0] for one in (found.loss, loss))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.fast
@pytest.mark.parametrize("frozen", ["none", "head", "below"])
def test_losses_by_document_with_frozen_factors(frozen: str) -> None:
    hidden = torch.randn(12, 8).double().requires_grad_(frozen != "below")
    weight = torch.randn(30, 8).double().requires_grad_(frozen != "head")
    labels = torch.randint(30, (12,))
    labels[[0, 5]] = -100
    factors, lengths = torch.tensor([0.5, -2.0, 3.0]).double(), [1, 7, 4]
    wanted = [one for one in (hidden, weight) if one.requires_grad]
    losses = document_cross_entropy(hidden, weight, labels, lengths)
    ours = torch.autograd.grad((factors * losses).sum(), wanted)
    tokens = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    expected = torch.stack([part.sum() for part in tokens.split(lengths)])
    torch.testing.assert_close(losses, expected)
    theirs = torch.autograd.grad((factors * expected).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_plan_says_what_is_minimised() -> None:
    config = compose_config(["recipe=text01_1b", "data.sources.corpus.path=none"])
    plans = []
    for objective in ("language_modelling", "preference"):
        config.objective = objective
        plans.append(describe(make_plan(config, 8, GPUS["h100"], Assumptions())))
        assert plans[-1]["objective"] == plans[-1]["stages"][0]["objective"] == objective
    text, pairs = plans
    assert pairs["flops_per_token"] == text["flops_per_token"]
    work = [plan["step_work_s"]["head"] for plan in plans]
    assert work[1] == pytest.approx(4 / 3 * work[0])
    assert pairs["memory_gib_per_rank"]["total"] >= text["memory_gib_per_rank"]["total"]


def test_the_planner_knows_the_memory_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels_of_a_gpu(monkeypatch)
    tokens, hidden, vocab, longest = 4096, 512, 50_000, 3000
    with torch.device("meta"):
        head = Head(hidden, vocab, bias=False).to(torch.bfloat16)
        rows = torch.empty(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(1, tokens, dtype=torch.int64)
        losses = head(rows * 1, labels, lengths=[longest, tokens - longest])
    head.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        losses.sum().backward()
    # Not seen: logits, inside of an op. Seen, as if it were new: the weight.
    sizes = (tokens, hidden, vocab, 2)
    predicted = head_bytes(*sizes, vocab * hidden, longest) - head_scratch(longest, *sizes[1:])
    assert live.peak - 2 * vocab * hidden == pytest.approx(predicted, rel=0.05)


# A step of the trainer


def answers_by_hand(model: TextModel, split: PreparedSplit, number: int) -> Tensor:
    """`[2]` log-probabilities of a pair's answers, each document alone, from all logits."""
    index = split.images
    assert index is not None
    one = torch.tensor([number]).numpy()
    (shards, places), (_, (offset,)) = split.places(one), split.locate(one)
    shard, place = int(shards[0]), int(places[0])
    tokens = torch.from_numpy(split.document(number).astype("int64"))
    mask = torch.from_numpy(index.masks[shard][offset : offset + len(tokens)].astype("bool"))
    half = int(index.totals(shards, places)[0, CHOSEN])
    found = []
    for begin, end in ((0, half), (half, len(tokens))):
        images = [
            replace(image, first=image.first - begin)
            for image in index.images(shard, place)
            if begin <= image.first < end
        ]
        (decoded,) = decode_images([undecoded(images)], ImageDecoder(0), tile_size=28)
        seen = Images(
            normalise_tiles(decoded.tiles, torch.float64),
            *map(torch.from_numpy, place_images([(one.first, one.layout) for one in images])),
        )
        text = tokens[begin:end]
        logits = model(text[None, :-1], images=seen)
        assert isinstance(logits, Tensor)
        values = torch.log_softmax(logits[0], dim=-1).gather(1, text[1:, None])[:, 0]
        assert mask[begin + 1 : end].any()
        found.append(values[mask[begin + 1 : end]].sum())
    return torch.stack(found)


def plain_model(config: RunConfig, weights: dict[str, Tensor] | None = None) -> TextModel:
    """The same weights in fp64, nowhere spread."""
    model = build_model(config.model, config.moe)
    init_model(model, config.model, config.seed)
    if weights is not None:
        model.load_state_dict(weights)
    return model.double()


@pytest.fixture
def trainer(data: Path, one_rank: torch.device, tmp_path: Path) -> Iterator[Trainer]:
    config = preference_config(data)
    config.preference.beta, config.moe.aux_loss_coef = BETA, 0.0
    config.optim.grad_clip = None
    config.evaluation.max_tokens = 10**6
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    yield trainer
    trainer.close()


def forget_copies(trainer: Trainer) -> None:
    """The weights have changed, as after an optimiser's step."""
    for unit in trainer.engine.stages:
        unit.reshard()  # type: ignore[operator]


def test_a_step_is_that_of_the_formula(trainer: Trainer, tmp_path: Path) -> None:
    config = trainer.config
    trainer.objective.prepare(tmp_path, "these weights")
    start, policy = plain_model(config), plain_model(config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        trainer.engine.parameters[name].data.to_local().add_(noise)
        parameter.data = trainer.engine.parameters[name].full_tensor().detach().double()
    forget_copies(trainer)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(lr: float, skip: Tensor) -> None:
        for name, parameter in trainer.engine.parameters.items():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.full_tensor()

    trainer.optimizer.step = keep_gradients  # type: ignore[method-assign]
    # Uneven, or a mean of means would pass for the mean.
    batch = next(b for b in trainer.loader if len({len(m.pairs) for m in b.micro_batches}) > 1)
    trainer.train_step(batch)
    row = trainer.objective.read_step()
    trainer.health.judge(1, batch.digest)
    whole = row["loss"] + trainer.config.moe.aux_loss_coef * row["aux_loss"]
    assert trainer.health.state()["losses"] == [pytest.approx(whole, rel=1e-6)]  # judged by
    (_, train), pairs = trainer.loader.splits, [p for m in batch.micro_batches for p in m.pairs]
    # Each answer sees itself and its prompt: so much attention is counted.
    lengths = [m.cu_seqlens.diff()[: 2 * len(m.pairs)] for m in batch.micro_batches]
    assert batch.sum_squared_lengths == sum(int((one.long() ** 2).sum()) for one in lengths)
    assert len(pairs) == batch.num_pairs == row["num_pairs"] > 4
    margins, ratios = [], []
    for pair in pairs:
        reference = answers_by_hand(start, train, pair.number).detach()
        ratios.append(answers_by_hand(policy, train, pair.number) - reference)
        margins.append(BETA * (ratios[-1][0] - ratios[-1][1]))
    loss = torch.log1p(torch.exp(-torch.stack(margins))).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    right = sum(bool(margin > 0) for margin in margins)
    assert 0 < right < len(pairs), "take another seed: the accuracy must not be trivial"
    expected = {
        "loss": loss,
        "reward_margin": torch.stack(margins).mean(),
        "reward_accuracy": right / len(pairs),
        "chosen_log_ratio": torch.stack(ratios)[:, 0].mean(),
        "rejected_log_ratio": torch.stack(ratios)[:, 1].mean(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(
            float(torch.as_tensor(value).detach()), rel=1e-5, abs=1e-5
        ), name
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        difference = (gradients[name] - parameter.grad).norm()
        # Keys' biases change no attention: what they have is rounding.
        assert difference <= 2e-5 * parameter.grad.norm() + 1e-8 * norm, name


def test_held_out_values_are_those_of_the_formula(trainer: Trainer, tmp_path: Path) -> None:
    trainer.objective.prepare(tmp_path, "these weights")
    for parameter in trainer.engine.parameters.values():
        parameter.data.to_local().mul_(1.02)
    forget_copies(trainer)
    start = plain_model(trainer.config)
    weights = {name: p.full_tensor() for name, p in trainer.engine.parameters.items()}
    policy, split = plain_model(trainer.config, weights), trainer.held_out["pairs"]
    with torch.no_grad():
        ratios = torch.stack(
            [
                answers_by_hand(policy, split, number) - answers_by_hand(start, split, number)
                for number in range(split.num_documents)
            ]
        )
    margins = BETA * (ratios[:, 0] - ratios[:, 1])
    values = trainer.objective.evaluate()
    assert values.keys() == {
        f"{name}/pairs"
        for name in (
            *("dpo_loss", "reward_margin", "reward_accuracy"),
            *("chosen_log_ratio", "rejected_log_ratio"),
        )
    }
    loss = float(torch.log1p(torch.exp(-margins)).mean())
    assert values["dpo_loss/pairs"] == pytest.approx(loss, rel=1e-5)
    assert values["reward_accuracy/pairs"] == float((margins > 0).double().mean())
    # A small difference of sums of log-probabilities, of some tens, in fp32.
    chosen = float(ratios[:, 0].mean())
    assert values["chosen_log_ratio/pairs"] == pytest.approx(chosen, rel=1e-5, abs=1e-5)


def test_reference_values_do_not_depend_on_neighbours(
    data: Path, one_rank: torch.device, tmp_path: Path
) -> None:
    config = preference_config(data)
    config.moe.capacity_factor = 0.5  # in training, half of all assignments find no room
    trainer = Trainer(config, build_mesh(config.parallel, one_rank), tmp_path)
    found = []
    for micro_batch_tokens in (192, 768):
        config.trainer.micro_batch_tokens = micro_batch_tokens
        split = trainer.held_out["pairs"]
        found.append(compute_reference(trainer.model, split, trainer.mesh, config))
    trainer.close()
    assert trainer.model.training
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


# Runs


def at_step(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed some time after a checkpoint."""
    shutil.copytree(whole, folder, symlinks=True)
    (folder / "DONE").unlink()
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return folder


def test_a_resumed_run_computes_no_reference_and_equals_the_undisturbed(
    whole: Path,
    data: Path,
    one_rank: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(*args: Any) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_module, "compute_reference", compute)
    folder = at_step(whole, tmp_path / "run", 2)
    fit(preference_config(data), one_rank, folder)
    assert rows(folder) == rows(whole)
    ours, theirs = (read_checkpoint(one / "checkpoints" / "step_4") for one in (folder, whole))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    states = [(one / "checkpoints" / "step_4" / STATE_FILE).read_text() for one in (folder, whole)]
    assert states[0] == states[1]
    # Killed before its first checkpoint, it begins again with what is stored.
    folder = at_step(whole, tmp_path / "early", 0)
    fit(preference_config(data, max_steps=1), one_rank, folder)
    assert rows(folder)[0] == rows(whole)[0]
    # Later the weights have moved on.
    folder = at_step(whole, tmp_path / "lost", 2)
    (folder / "preference" / "pairs-valid.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"pairs-valid.safetensors is missing, or not of this"):
        fit(preference_config(data), one_rank, folder)


@pytest.mark.slow
def test_runs_on_other_meshes_equal_one_rank(whole: Path, data: Path, tmp_path: Path) -> None:
    jobs = []
    for name, parallel in (
        ("zero 3", ParallelConfig(zero_stage=3)),
        ("ep 2", ParallelConfig(ep=2, zero_stage=2)),
        ("moved", ParallelConfig(zero_stage=0)),
    ):
        config = preference_config(data)
        config.parallel = parallel
        jobs.append((config, tmp_path / name))
    at_step(whole, tmp_path / "moved", 2)
    run_world(run_jobs, 2, jobs)
    stored = [
        (folder / "preference" / "pairs-train.safetensors").read_bytes()
        for folder in (whole, tmp_path / "moved")
    ]
    assert stored[0] == stored[1]
    for _, folder in jobs:
        assert len(rows(folder)) == len(rows(whole)) == 6
        for row, expected in zip(rows(folder), rows(whole), strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                if key == "reward_accuracy" and row["step"] == 1:
                    continue  # all margins are 0, but for rounding
                if isinstance(value, float):
                    value = pytest.approx(value, rel=1e-5, abs=2e-5 if "ratio" in key else 3e-6)
                assert row[key] == value, (folder, key)


def test_an_objective_is_kept_to_the_end(
    data: Path, one_rank: torch.device, tmp_path: Path
) -> None:
    config = preference_config(data, max_steps=1)
    config.objective = "language_modelling"
    config.data.sources["pairs"].weight, config.data.sources["chat"].weight = 0.0, 1.0
    fit(config, one_rank, tmp_path)
    with pytest.raises(ValueError, match=r"objective=preference, but .*step_1 is from within obj"):
        fit(preference_config(data), one_rank, tmp_path)


def chain(data: Path, run_dir: Path) -> RunConfig:
    """Some steps of text, then pairs; the second evaluation ends the run."""
    config = preference_config(data)
    config.objective = "language_modelling"
    config.trainer.max_steps = None
    config.checkpoint.every_steps = None
    config.evaluation.every_steps = None
    schedule = ScheduleConfig(phases=[PhaseConfig(20_000, 1.0)])
    config.stages = {
        "chat": StageConfig(tokens=2000, weights={"chat": 1.0}, schedule=schedule),
        "answers": StageConfig(
            objective="preference",
            weights={"pairs": 1.0},
            schedule=schedule,
            optim={"lr": 1e-4},
            preference={"patience": 1, "min_improvement": 1e3},
            evaluation={"every_steps": 2},
        ),
    }
    config.run_root, config.run_id = str(run_dir.parent), run_dir.name
    check_run(config, 1)
    return config


def test_a_last_stage_on_pairs_ends_early(
    data: Path, one_rank: torch.device, tmp_path: Path
) -> None:
    config = chain(data, tmp_path)
    for _ in config.stages:
        trainer = open_stage(config, one_rank, tmp_path, is_first=True)
        assert trainer is not None
        trainer.fit()
        trainer.close()
        first = trainer.start.first_step
        give_back(one_rank)
    assert (tmp_path / "DONE").exists()
    assert trainer.tokens < 20_000
    read = rows(tmp_path)
    last = read[-2]["step"]
    evaluated = [row["step"] for row in read if "eval_dpo_loss/pairs" in row]
    assert len(evaluated) == 2
    assert evaluated[-1] == last <= first + 4
    assert not any("eval_loss/chat" in row for row in read)
    # What waited for a row from the first stage is no pair, and is not trained on.
    of_pairs = [row for row in read if row.get("stage") == "answers"]
    assert len({row["tokens/chat/short"] for row in [*of_pairs, read[first - 1]]}) == 1
    assert of_pairs[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    # The reference is what the first stage has made.
    file = tmp_path / "preference" / "answers" / "pairs-train.safetensors"
    stored = reference_module.safetensors.torch.load_file(file)[KEY]
    tensors = read_checkpoint(tmp_path / "checkpoints" / f"step_{first}")
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    start, (_, train) = plain_model(config, weights), trainer.loader.splits
    with torch.no_grad():
        for number in (0, 1, 2, train.num_documents - 1):
            expected = answers_by_hand(start, train, number)
            torch.testing.assert_close(stored[number].double(), expected, rtol=1e-5, atol=1e-5)
    # It is at its end, until it is to have more patience.
    again = open_stage(config, one_rank, tmp_path, is_first=True)
    assert again is not None
    assert again.finished
    again.close()
    config.stages["answers"].preference["patience"] = 2
    again = open_stage(config, one_rank, tmp_path, is_first=True)
    assert again is not None
    assert not again.finished
    again.close()


# What is refused


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft"}, r"objective=sft: must be one of language_modelling, preference"),
        ({"parallel.cp": 2}, r"parallel\.cp=2 does not go with objective=preference"),
        ({"preference.beta": 0.0}, r"preference\.beta=0\.0: must be above 0"),
        ({"preference.min_improvement": -1.0}, r"preference\.min_improvement=-1\.0: must not"),
        ({"preference.patience": 0}, r"preference\.patience=0: must be at least 1, or null"),
        ({"preference.patience": 2}, r"preference\.patience=2 counts evaluations, and there are"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    config = compose_config(["recipe=text01_tiny", "evaluation.every_steps=null"])
    config.objective = "preference"
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        setattr(getattr(config, group) if group else config, name, value)
    with pytest.raises(ValueError, match=message):
        check_run(config, 2)


@pytest.mark.fast
def test_only_the_last_stage_can_end_early(data: Path, tmp_path: Path) -> None:
    config = chain(data, tmp_path)
    config.stages = dict(reversed(config.stages.items()))
    with pytest.raises(ValueError, match=r"stages\.answers\.preference\.patience=1: only a run's"):
        check_run(config, 1)


def test_documents_of_another_objective_are_refused_before_the_first_stage(
    data: Path, one_rank: torch.device, tmp_path: Path
) -> None:
    config = chain(data, tmp_path)
    config.stages["chat"].weights["pairs"] = 0.1
    with pytest.raises(
        ValueError, match=r"stages\.chat: data\.sources\.pairs: .*would learn the rejected ones too"
    ):
        open_stage(config, one_rank, tmp_path, is_first=True)
    config = chain(data, tmp_path)
    config.stages["answers"].weights["chat"] = 0.1
    with pytest.raises(
        ValueError,
        match=r"stages\.answers: data\.sources\.chat: objective=preference needs pairs, and (\d+) "
        r"of \1 documents of .*chat \(train\) are none",
    ):
        open_stage(config, one_rank, tmp_path, is_first=True)
