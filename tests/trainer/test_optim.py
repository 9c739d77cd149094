"""The optimiser against torch's own AdamW, and the choice of its implementation."""

import sys
from types import ModuleType

import pytest
import torch
from support.tiny import tiny_engine, tiny_model
from torch import Tensor, nn

from fulmen.models.config import MoEConfig
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.optim import Optimizer, build_optimizer

pytestmark = pytest.mark.fast

CONFIG = OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
RATES = [3e-3, 1e-2, 5e-3, 1e-3]


class FusedAdam(torch.optim.Optimizer):
    """NVIDIA apex's interface and bookkeeping (one `step` per group), written in plain torch."""

    def __init__(
        self,
        params: list[dict],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(
                    parameter.grad, parameter.grad, value=1 - beta2
                )
                first = state["exp_avg"] / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                parameter.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    apex.__path__ = []  # type: ignore[attr-defined]
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def build(device: torch.device) -> tuple[TextModel, ZeroEngine]:
    return tiny_engine(device, ParallelConfig(zero_stage=1), seed=5)


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = (torch.arange(24) * (step + 3) % 50)[None]
    output = model(ids, labels=ids.roll(-1, 1))
    assert isinstance(output, LossOutput)
    return output.loss_sum / 24 + output.aux_loss


def update(model: TextModel, engine: ZeroEngine, optimizer: Optimizer, step: int) -> None:
    engine.begin_micro_batch(is_last=True)
    loss_of(model, step).backward()
    optimizer.step(RATES[step])


def expected() -> tuple[dict[str, Tensor], torch.optim.AdamW, nn.Module]:
    """torch's AdamW on an unsharded model, norms in a group without decay."""
    model = TextModel(tiny_model(), MoEConfig())
    init_model(model, model.config, 5)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    for step, rate in enumerate(RATES):
        loss_of(model, step).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer, model


def assert_as_expected(engine: ZeroEngine, optimizer: Optimizer) -> None:
    weights, reference, model = expected()
    named = dict(model.named_parameters())
    moments = dict(optimizer.named_moments())
    for name, value in weights.items():
        ours = engine.parameters[name].full_tensor()
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-6, msg=name)
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs = reference.state[named[name]][moment]
            tolerance = float(theirs.abs().max()) * 1e-5
            difference = (moments[f"{moment}.{name}"].full_tensor() - theirs).abs().max()
            assert difference <= tolerance, f"{moment}.{name}"


def test_updates_are_those_of_torch_adamw(one_rank: torch.device) -> None:
    model, engine = build(one_rank)
    optimizer = Optimizer(engine, CONFIG)
    for step in range(len(RATES)):
        update(model, engine, optimizer, step)
        assert all(parameter.grad is None for parameter in engine.parameters.values())
    assert set(optimizer.steps.values()) == {len(RATES)}
    assert_as_expected(engine, optimizer)


def test_moments_and_steps_carry_an_optimizer_over(one_rank: torch.device) -> None:
    model, engine = build(one_rank)
    first = Optimizer(engine, CONFIG)
    for step in range(2):
        update(model, engine, first, step)
    second = Optimizer(engine, CONFIG)
    held = dict(first.named_moments())
    for name, moment in second.named_moments():
        moment.to_local().copy_(held[name].to_local())
    second.set_steps(first.steps)
    for step in range(2, len(RATES)):
        update(model, engine, second, step)
    assert set(second.steps.values()) == {len(RATES)}
    assert_as_expected(engine, second)


def test_norms_have_no_decay(one_rank: torch.device) -> None:
    _, engine = build(one_rank)
    optimizer = Optimizer(engine, CONFIG)
    before = {name: p.full_tensor().clone() for name, p in engine.parameters.items()}
    for parameter in engine.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in engine.parameters.items():
        kept = 1.0 if "norm" in name else 1 - 0.1 * 0.3
        assert ("norm" in name) == (parameter.dim() == 1)
        torch.testing.assert_close(parameter.full_tensor(), kept * before[name], msg=name)


def test_apex_is_used_when_asked_for(one_rank: torch.device, fake_apex: None) -> None:
    model, engine = build(one_rank)
    optimizer = Optimizer(engine, OptimConfig(**(vars(CONFIG) | {"name": "apex_fused_adam"})))
    assert isinstance(optimizer._optimizer, FusedAdam)
    for step in range(2):
        update(model, engine, optimizer, step)
    resumed = Optimizer(engine, OptimConfig(**(vars(CONFIG) | {"name": "apex_fused_adam"})))
    held = dict(optimizer.named_moments())
    for name, moment in resumed.named_moments():
        moment.to_local().copy_(held[name].to_local())
    resumed.set_steps(optimizer.steps)
    for step in range(2, len(RATES)):
        update(model, engine, resumed, step)
    assert_as_expected(engine, resumed)


@pytest.mark.parametrize("name", ["adamw", "apex_fused_adam"])
def test_a_skipped_step_leaves_no_trace(name: str, one_rank: torch.device, fake_apex: None) -> None:
    model, engine = build(one_rank)
    optimizer = Optimizer(engine, OptimConfig(**(vars(CONFIG) | {"name": name})))
    for step in range(len(RATES)):
        if step in (1, 2):  # in the middle, and the second in turn
            for parameter in engine.parameters.values():
                parameter.grad = torch.full_like(parameter, torch.nan)
            optimizer.step(0.1, skip=torch.tensor(True))
            optimizer.uncount()
        engine.begin_micro_batch(is_last=True)
        loss_of(model, step).backward()
        optimizer.step(RATES[step], skip=torch.tensor(False))
    assert set(optimizer.steps.values()) == {len(RATES)}
    assert_as_expected(engine, optimizer)


def test_apex_is_not_used_unasked(fake_apex: None) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    assert isinstance(build_optimizer(groups, OptimConfig(lr=1.0)), torch.optim.AdamW)


@pytest.mark.parametrize("installed", [None, "the Pyramid toolkit"])
def test_without_nvidia_apex_the_message_says_what_to_do(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail; the other project of that name has no `optimizers`.
    module = ModuleType("apex") if installed else None
    monkeypatch.setitem(sys.modules, "apex", module)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    groups = [{"params": [nn.Parameter(torch.ones(2))]}]
    with pytest.raises(ValueError, match=r"optim\.name=apex_fused_adam: .* not installed .*adamw"):
        build_optimizer(groups, OptimConfig(name="apex_fused_adam", lr=1.0))
