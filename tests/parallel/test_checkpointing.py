"""What a block keeps does not change what it computes: losses, counts and every gradient."""

from typing import Any

import pytest
import torch
from support.tiny import tiny_engine
from support.worlds import run_world
from torch import Tensor

from fulmen.data.packing import PackedBatch
from fulmen.models.config import MoEConfig
from fulmen.models.text import LossOutput
from fulmen.parallel import checkpointing
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.trainer.inputs import model_inputs

TOKENS = 64
BOUNDS = [0, 1, 40, 47, 58, TOKENS]
"""One longer than half of the row, one of length 1, padding at the end."""
NONE = {"activation_checkpointing": "none"}
FULL = {"activation_checkpointing": "full"}
WAYS: dict[str, dict[str, Any]] = {
    "none": NONE,
    "selective": {"activation_checkpointing": "selective"},
    "full": FULL,
    "full offload": FULL | {"offload_checkpoints": True},
    "none chunks": NONE | {"chunk_tokens": 12},
    "full chunks": FULL | {"chunk_tokens": 12},
    "full one chunk offload": FULL | {"chunk_tokens": 4096, "offload_checkpoints": True},
}
REPEATED = ("selective", "full", "full offload")
"""They run the same ops on the same values, so that nothing may differ."""
MESHES: list[dict[str, Any]] = [
    {"zero_stage": 3},
    {"zero_stage": 1, "cp": 2},
    {"zero_stage": 3, "cp": 2, "softmax_attention": "ring", "lightning_attention": "lasp"},
    {"zero_stage": 0, "ep": 2, "expert_token_groups": 2},
    {"zero_stage": 2, "etp": 2},
    {"zero_stage": 3, "ep": 2, "cp": 2},
]


def one_step(
    device: torch.device, parallel: dict[str, Any], way: dict[str, Any], dtype: str, drops: bool
) -> dict[str, Tensor]:
    """Losses, routing and whole gradients of two micro-batches of one rank's row, or its part."""
    config = ParallelConfig(**parallel)
    moe = MoEConfig(capacity_factor=0.7) if drops else MoEConfig()
    options = {"dtype": getattr(torch, dtype), "moe": moe} | way
    model, engine = tiny_engine(device, config, **options)
    mesh = build_mesh(config, device)
    result: dict[str, Tensor] = {}
    for number in range(2):
        generator = torch.Generator().manual_seed(10 * number + mesh.dp_rank)
        ids = torch.randint(200, (1, TOKENS), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, [end - 1 for end in BOUNDS[1:]]] = -100
        labels[:, BOUNDS[-2] :] = -100
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        engine.begin_micro_batch(is_last=number == 1)
        output = model(**model_inputs(PackedBatch(ids, labels, bounds, BOUNDS[-2]), mesh))
        assert isinstance(output, LossOutput)
        (output.loss_sum / TOKENS + 0.05 * output.aux_loss).backward()
        for name, value in output._asdict().items():
            result[f"{number} {name}"] = value.detach().clone()
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None
        result[name] = parameter.grad.full_tensor()  # type: ignore[attr-defined]
    return result


def all_ways(
    device: torch.device, parallel: dict[str, Any], dtype: str, drops: bool
) -> dict[str, dict[str, Tensor]]:
    return {name: one_step(device, parallel, way, dtype, drops) for name, way in WAYS.items()}


def check(
    by_way: dict[str, dict[str, Tensor]],
    drops: bool,
    tolerance: float,
    exact: tuple[str, ...] = REPEATED,
) -> None:
    expected = by_way["none"]
    dropped = int(expected["0 num_dropped"])
    assert (dropped > 0) == drops
    assert sum(name.startswith("layers.") for name in expected) > 20
    for way, values in by_way.items():
        for name, value in values.items():
            said = f"{way}: {name}"
            if value.dtype == torch.int64 or way in exact:
                assert torch.equal(value, expected[name]), said
                continue
            size = expected[name].abs().max()
            assert size > 0, said
            error = (value - expected[name]).abs().max() / size
            assert error <= tolerance, f"{said}: {error}"


@pytest.mark.fast
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_ways_agree_on_one_rank(
    dtype: str, tolerance: float, drops: bool, one_rank: torch.device
) -> None:
    check(all_ways(one_rank, {"zero_stage": 1}, dtype, drops), drops, tolerance)


@pytest.mark.fast
def test_what_selective_checkpoints_keep() -> None:
    aten = torch.ops.aten
    flash = aten._flash_attention_forward.default
    kept = [aten.mm.default, flash, aten._scaled_dot_product_cudnn_attention.default]
    repeated = [aten.silu.default, aten.mul.Tensor, aten.native_layer_norm.default]
    assert all(checkpointing._is_costly(op) for op in kept)
    assert not any(checkpointing._is_costly(op) for op in repeated)
    assert checkpointing._is_softmax_core(flash)
    assert not checkpointing._is_softmax_core(aten.mm.default)
    with torch.no_grad():  # in a ring, whose sums go on in its output
        assert not checkpointing._is_costly(flash)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", MESHES, ids=lambda values: str(values)[1:-1])
def test_ways_agree_over_ranks(parallel: dict[str, Any]) -> None:
    drops = "ep" in parallel or "etp" in parallel
    for by_way in run_world(all_ways, 2, parallel, "float32", drops):
        check(by_way, drops, 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 3])
def test_checkpointing_on_the_gpu(stage: int, one_rank: torch.device) -> None:
    # Sums over rows may come in another order there.
    check(all_ways(one_rank, {"zero_stage": stage}, "float32", True), True, 1e-5, exact=())
    low = all_ways(one_rank, {"zero_stage": stage}, "bfloat16", True)
    # Rows of chunks may be rounded otherwise, and then be routed otherwise.
    check({way: low[way] for way in ("none", *REPEATED)}, True, 2e-2, exact=())
