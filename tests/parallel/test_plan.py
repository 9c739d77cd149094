"""The plan reaches every layer, of either kind, and every parameter."""

import pytest
import torch
from support.tiny import tiny_model
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fulmen.models.config import MoEConfig
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.parallel.zero import ZeroEngine

pytestmark = pytest.mark.fast


def build(
    device: torch.device, *, activation_checkpointing: str = "none"
) -> tuple[TextModel, ZeroEngine]:
    config = ParallelConfig(zero_stage=3)
    with torch.device("meta"):
        model = TextModel(tiny_model(), MoEConfig())
    engine = parallelize(
        model,
        build_mesh(config, device),
        config,
        dtype=torch.float32,
        activation_checkpointing=activation_checkpointing,
        compile_blocks=False,
        seed=0,
    )
    return model, engine


def test_every_layer_and_its_experts_are_units(one_rank: torch.device) -> None:
    model, engine = build(one_rank)
    kinds = {type(block.self_attn).__name__ for block in model.layers}
    assert kinds == {"LightningAttention", "SoftmaxAttention"}
    for block in model.layers:
        assert isinstance(block, FSDPModule)
        assert isinstance(block.block_sparse_moe.experts, FSDPModule)
    assert isinstance(model.embed_tokens, FSDPModule)
    assert isinstance(model, FSDPModule)
    assert list(engine.parameters) == [name for name, _ in model.named_parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in engine.parameters.values())


def test_a_module_left_local_is_an_error(one_rank: torch.device) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = build_mesh(ParallelConfig(), one_rank)
    engine = ZeroEngine(model, mesh, dtype=torch.float32)
    engine.shard(model[0], 1)
    with pytest.raises(AssertionError, match=r"1\.weight was left out"):
        engine.materialize()


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
