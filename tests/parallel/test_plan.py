"""The plan reaches every layer, of either kind, and every parameter."""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.tiny import tiny_engine
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard

from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh, build_mesh
from fulmen.parallel.zero import ZeroEngine


def build(device: torch.device, **options: Any) -> tuple[TextModel, ZeroEngine]:
    return tiny_engine(device, ParallelConfig(zero_stage=3), **options)


@pytest.mark.fast
def test_every_layer_and_its_experts_are_units(one_rank: torch.device) -> None:
    model, engine = build(one_rank)
    kinds = {type(block.self_attn).__name__ for block in model.layers}
    assert kinds == {"LightningAttention", "SoftmaxAttention"}
    for block in model.layers:
        assert isinstance(block, FSDPModule)
        assert isinstance(block.block_sparse_moe.experts, FSDPModule)
        assert isinstance(block.block_sparse_moe.gate, FSDPModule)
    assert isinstance(model.embed_tokens, FSDPModule)
    assert isinstance(model.lm_head, FSDPModule)
    assert isinstance(model, FSDPModule)
    assert list(engine.parameters) == [name for name, _ in model.named_parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in engine.parameters.values())


@pytest.mark.fast
def test_a_module_left_local_is_an_error(one_rank: torch.device) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = build_mesh(ParallelConfig(), one_rank)
    engine = ZeroEngine(model, mesh, dtype=torch.float32)
    engine.shard(model[0], 1)
    with pytest.raises(AssertionError, match=r"1\.weight was left out"):
        engine.materialize()


@pytest.mark.fast
@pytest.mark.parametrize(("choice", "passes"), [("none", 1), ("full", 2)])
def test_activation_checkpointing_computes_every_block_again(
    choice: str, passes: int, one_rank: torch.device
) -> None:
    model, engine = build(one_rank, activation_checkpointing=choice)
    calls = dict.fromkeys(range(len(model.layers)), 0)
    for number, block in enumerate(model.layers):

        def count(*_: object, number: int = number) -> None:
            calls[number] += 1

        block.self_attn.register_forward_hook(count)
    engine.begin_micro_batch(is_last=True)
    ids = torch.arange(12)[None]
    output = model(ids, labels=ids)
    assert isinstance(output, LossOutput)
    (output.loss_sum + output.aux_loss).backward()
    assert set(calls.values()) == {passes}
    assert all(parameter.grad is not None for parameter in engine.parameters.values())


def step(model: TextModel, engine: ZeroEngine) -> LossOutput:
    engine.begin_micro_batch(is_last=True)
    ids = torch.arange(12)[None]
    output = model(ids, labels=ids)
    assert isinstance(output, LossOutput)
    (output.loss_sum + output.aux_loss).backward()
    return output


@pytest.mark.fast
def test_the_router_is_fp32_in_bf16_training(one_rank: torch.device) -> None:
    model, engine = build(one_rank, dtype=torch.bfloat16)
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def record(module: nn.Linear, _: object, output: torch.Tensor) -> None:
        seen.append((module.weight.dtype, output.dtype))

    for block in model.layers:
        block.block_sparse_moe.gate.register_forward_hook(record)
    dtypes: list[torch.dtype] = []
    model.layers[0].register_forward_hook(lambda *args: dtypes.append(args[2][0].dtype))
    step(model, engine)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert dtypes == [torch.bfloat16]


@pytest.mark.slow
def test_compilation_is_not_lost(one_rank: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(*build(one_rank)).loss_sum
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("torch.compile", compiled)
    torch._dynamo.reset()
    counters.clear()
    model, engine = build(one_rank, compile_blocks=True)
    output = step(model, engine)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(output.loss_sum, expected)


@pytest.mark.fast
def test_ranks_that_cannot_share_the_experts_are_told() -> None:
    mesh = cast(Mesh, SimpleNamespace(world_size=4))  # of the rest of a mesh nothing is asked
    engine = ZeroEngine(nn.Linear(1, 1), mesh, dtype=torch.float32)
    assert engine._expert_placement(nn.Parameter(torch.empty(4, 3, 3))) == Shard(0)
    assert engine._expert_placement(nn.Parameter(torch.empty(2, 8, 3))) == Shard(1)
    assert engine._expert_placement(nn.Parameter(torch.empty(2, 3, 8))) == Shard(2)
    with pytest.raises(ValueError, match=r"4 ranks cannot share .* model\.num_experts=2"):
        engine._expert_placement(nn.Parameter(torch.empty(2, 3, 3)))
