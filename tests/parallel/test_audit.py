"""The audit: nothing is left without a plan, and the tables say what is there."""

from collections.abc import Callable

import pytest
import torch
from support.tiny import tiny_engine
from support.worlds import run_world
from torch import nn
from torch.distributed.tensor import DTensor

from fulmen.models.config import MoEConfig
from fulmen.models.text import TextModel
from fulmen.parallel.audit import audit
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.seams import fill_seam, filled_with
from fulmen.parallel.zero import ZeroEngine


def build(device: torch.device, config: ParallelConfig) -> tuple[TextModel, ZeroEngine]:
    return tiny_engine(device, config, activation_checkpointing="full")


def without(path: str, seam: str) -> Callable[[TextModel], None]:
    def forget(model: TextModel) -> None:
        del vars(model.get_submodule(path))[seam]

    return forget


def no_change(model: TextModel) -> None: ...


def add_window(model: TextModel) -> None:
    class Windowed(nn.Linear):
        """Would pass for a linear layer if subclasses did."""

    model.layers[1].extra = Windowed(2, 2)


def add_parameter(model: TextModel) -> None:
    model.layers[0].self_attn.scale = nn.Parameter(torch.ones(2))


def cells(report: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell] for line in report.splitlines()]


def audits(device: torch.device) -> dict[str, str]:
    """On two ranks that share rows: the tables, and what is said when something is missing."""
    said = {}
    breaks = {
        "lightning": without("layers.2.self_attn", "attend"),
        "softmax": without("layers.1.self_attn", "attend"),
        "moe": without("layers.0.block_sparse_moe", "count_over_row"),
        "whole": no_change,
    }
    config = ParallelConfig(cp=2, zero_stage=2, expert_zero_stage=0)
    for name, change in breaks.items():
        model, engine = build(device, config)
        change(model)
        try:
            said[name] = audit(model, engine, config)
        except TypeError as error:
            said[name] = f"stopped: {error}"
    return said


@pytest.mark.slow
def test_on_ranks_that_share_rows() -> None:
    here, there = run_world(audits, 2)
    assert here.keys() == {"lightning", "softmax", "moe", "whole"}
    for name, layer in (
        ("lightning", "layers.2.self_attn (LightningAttention) attends to other tokens"),
        ("softmax", "layers.1.self_attn (SoftmaxAttention) attends to other tokens"),
        ("moe", "layers.0.block_sparse_moe (MoE) counts over a whole row"),
    ):
        assert here[name].startswith(f"stopped: {layer}, but nothing in parallel/plan.py")
        assert there[name] == here[name]

    rows = cells(here["whole"])
    assert rows[0] == ["layer", "number", "tokens, cp=2", "experts, ep=1 etp=1"]
    for row in (
        ["LightningAttention", "2", "LASP+: one gather of states", "-"],
        ["SoftmaxAttention", "1", "gather of keys and values, balanced", "-"],
        ["RMSNorm", "9", "each by itself", "-"],
        ["Embedding", "1", "each by itself", "-"],
        ["Head", "1", "each by itself", "-"],
    ):
        assert row in rows
    # 2 lightning layers, interleaved q, k and v of 2 heads of 16: split by ZeRO over both ranks.
    qkv, summed = "layers.*.self_attn.qkv_proj.weight", "ranks 0-1"
    assert [qkv, "2", "96 x 32", "48 x 32", "dim 0 over dp=2", "2", summed] in rows
    experts = "layers.*.block_sparse_moe.experts.w1"
    whole = "4 x 24 x 32"
    assert [experts, "3", whole, whole, "copy on dp_replicate=2", "0", summed] in rows
    embedding = ["embed_tokens.weight", "1", "301 x 32"]
    assert [*embedding, "151 x 32", "dim 0 over dp=2", "2", summed] in rows
    assert [*embedding, "150 x 32", "dim 0 over dp=2", "2", summed] in cells(there["whole"])


@pytest.mark.fast
def test_on_one_rank(one_rank: torch.device) -> None:
    config = ParallelConfig()
    model, engine = build(one_rank, config)
    report = audit(model, engine, config)
    rows = cells(report)
    assert ["LightningAttention", "2", "all on one rank", "-"] in rows
    named = {row[0] for row in rows if len(row) == 7}
    assert {name for name in named if not name.startswith("layers.")} == {
        "parameter",
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
    }
    # Every parameter is in one of the rows.
    assert sum(int(row[1]) for row in rows if len(row) == 7 and row[1].isdigit()) == len(
        engine.parameters
    )
    total = sum(parameter.numel() for parameter in engine.parameters.values())
    assert f"{total:,} parameters (torch.float32), {total:,} of them on this rank" in report


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_window, r"layers\.1\.extra \(Windowed\) is of a type that .* does not know"),
        (add_parameter, r"layers\.0\.self_attn\.scale is in no ZeRO unit"),
    ],
)
def test_what_nobody_planned_stops(
    change: Callable[[TextModel], None], said: str, one_rank: torch.device
) -> None:
    model, engine = build(one_rank, ParallelConfig())
    change(model)
    with pytest.raises(TypeError, match=said):
        audit(model, engine, ParallelConfig())


@pytest.mark.fast
def test_experts_left_on_one_rank_stop(one_rank: torch.device) -> None:
    model, engine = build(one_rank, ParallelConfig())
    (name, moe), *_ = ((n, m) for n, m in model.named_modules() if hasattr(m, "dispatch"))
    with pytest.raises(TypeError, match=rf"{name} .* sends tokens to experts.*`dispatch`"):
        audit(model, engine, ParallelConfig(ep=2))
    for module in model.modules():
        if hasattr(module, "dispatch"):
            fill_seam(module, "dispatch", moe.dispatch, "all-to-all")
    assert "all-to-all" in audit(model, engine, ParallelConfig(etp=2))


@pytest.mark.fast
def test_a_seam_without_a_note_has_the_functions_name(one_rank: torch.device) -> None:
    model, _ = build(one_rank, ParallelConfig())
    layer = model.layers[0].self_attn
    assert filled_with(layer, "attend") is None
    fill_seam(layer, "attend", layer.attend, "a note")
    assert filled_with(layer, "attend") == "a note"
    layer.attend = DTensor.from_local  # the note is of the one before
    assert filled_with(layer, "attend") == "from_local"


@pytest.mark.fast
def test_a_global_router_left_local_stops_the_run(one_rank: torch.device) -> None:
    config = ParallelConfig()
    moe = MoEConfig(capacity_factor=1.0, global_router=True)
    model, engine = tiny_engine(one_rank, config, moe=moe)
    moe_rows = [row for row in cells(audit(model, engine, config)) if row[0] == "MoE"]
    assert [row[3] for row in moe_rows] == ["capacity shared by all ranks"]
    without("layers.1.block_sparse_moe", "allowance")(model)
    with pytest.raises(TypeError, match=r"layers\.1\.block_sparse_moe .*moe\.global_router"):
        audit(model, engine, config)
