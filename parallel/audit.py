"""What became of each parameter and each layer, as tables, before the first step.

A layer that was silently left local, because nobody thought of its type, trains to wrong losses and
says nothing. So this does not ask the plan what it meant to do: it looks at what the model's
modules hold now, and stops the run at the first one that lacks what the mesh asks for.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fulmen.models.coca import Attention, CaptionBlock, CoCa, Contrast, Pooler, TextHead
from fulmen.models.layers import RMSNorm
from fulmen.models.lightning import LightningAttention
from fulmen.models.moe import Experts, MoE, Router
from fulmen.models.softmax import SoftmaxAttention
from fulmen.models.text import Block, Head, TextModel
from fulmen.models.vision import (
    PatchEmbedding,
    VisionAttention,
    VisionBlock,
    VisionEmbeddings,
    VisionEncoder,
    VisionMLP,
    VisionTower,
    VisionTransformer,
)
from fulmen.models.vl import Projector, VisionLanguageModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.rendezvous import name_ranks
from fulmen.parallel.seams import filled_with
from fulmen.parallel.zero import ZeroEngine, local_part

ROW_SEAMS = {
    "begin": "needs what comes before its tokens",
    "attend": "attends to other tokens",
    "count_over_row": "counts over a whole row",
    "collect": "shows patches of any rank's tiles",
}
DATA_SEAMS = {"gather": "compares with the pairs of all ranks"}
"""The same where ranks have other rows."""
"""Method -> why a layer that has it needs another one where rows are spread."""
EXPERT_SEAMS = {"dispatch": "sends tokens to experts"}
TOKEN_WISE = (nn.Embedding, nn.Linear, RMSNorm, Router, Head, nn.LayerNorm, PatchEmbedding)
"""Look at one token, or patch, at a time: nothing to do, wherever the tokens are."""
TILE_WISE = (VisionEmbeddings, VisionAttention)
"""Look at one tile of an image at a time, which is never cut: nothing to do, wherever it is run."""
PAIR_WISE = (Attention, Pooler)
"""Look at one image with its caption at a time: with them no row is spread over ranks."""
MIXING = (LightningAttention, SoftmaxAttention, MoE, Experts, VisionLanguageModel, Contrast)
"""Have seams."""
CONTAINERS = (
    *(TextModel, Block, nn.ModuleList, Projector),
    *(VisionTower, VisionTransformer, VisionEncoder, VisionBlock, VisionMLP),
    *(CoCa, CaptionBlock, TextHead),
)
"""Only call what is inside."""
EXPERT_AXES = ("ep", "etp")
"""Mesh axes along which ranks hold other weights; along all others gradients are summed."""
Row = tuple[str, ...]


def audit(model: nn.Module, engine: ZeroEngine, config: ParallelConfig) -> str:
    """The tables of the log; `TypeError` naming the first layer or parameter without a plan."""
    experts = f"experts, ep={config.ep} etp={config.etp}"
    layers = [
        ("layer", "number", f"tokens, cp={config.cp}", experts),
        *_layer_rows(model, config, engine.mesh.world_size),
    ]
    parameters = [
        ("parameter", "number", "shape", "on a rank", "split", "ZeRO", "gradient summed over"),
        *_parameter_rows(model, engine),
    ]
    whole = sum(parameter.numel() for parameter in engine.parameters.values())
    here = sum(local_part(parameter).numel() for parameter in engine.parameters.values())
    frozen = whole - sum(parameter.numel() for parameter in engine.trainable.values())
    dtypes = {str(parameter.dtype) for parameter in engine.parameters.values()}
    return (
        f"{_table(layers)}\n{_table(parameters)}\n"
        f"{whole:,} parameters ({', '.join(sorted(dtypes))}), {here:,} of them on this rank"
        + (f"; {frozen:,} are frozen" if frozen else "")
    )


def _layer_rows(model: nn.Module, config: ParallelConfig, world_size: int) -> list[Row]:
    numbers: dict[tuple[str, str, str], int] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind not in TOKEN_WISE + TILE_WISE + PAIR_WISE + MIXING + CONTAINERS:
            raise TypeError(
                f"{name} ({kind.__name__}) is of a type that parallel/audit.py does not know: say "
                "there whether it looks at one token at a time, and give it a plan if it does not"
            )
        if kind in CONTAINERS:
            continue
        tokens = _seams(name, module, ROW_SEAMS, spread=config.cp > 1, key="parallel.cp > 1")
        tokens = tokens or _seams(name, module, DATA_SEAMS, spread=world_size > 1, key="the batch")
        experts = _seams(
            name,
            module,
            EXPERT_SEAMS,
            spread=config.ep * config.etp > 1,
            key="parallel.ep or etp > 1",
        )
        if getattr(module, "global_router", False):
            shared = {"allowance": "has a global router"}
            key = "moe.global_router"
            plans = [_seams(name, module, shared, spread=True, key=key), experts]
            experts = "; ".join(filter(None, plans))
        alone = "within a tile" if kind in TILE_WISE else "each by itself"
        alone = "within a pair" if kind in PAIR_WISE else alone
        row = (kind.__name__, tokens or alone, experts or "-")
        numbers[row] = numbers.get(row, 0) + 1
    return [(kind, str(number), *plan) for (kind, *plan), number in numbers.items()]


def _seams(name: str, module: nn.Module, seams: dict[str, str], *, spread: bool, key: str) -> str:
    """How the module's seams are filled; '' if it has none of these."""
    plans = []
    for seam, reason in seams.items():
        if not hasattr(type(module), seam):
            continue
        plan = filled_with(module, seam)
        if spread and plan is None:
            raise TypeError(
                f"{name} ({_kind(module).__name__}) {reason}, but nothing in parallel/plan.py has "
                f"filled its `{seam}`, so that it would be left out of {key}"
            )
        plans.append(plan or "all on one rank")
    return "; ".join(dict.fromkeys(plans))


def _kind(module: nn.Module) -> type[nn.Module]:
    """The type that the model was written with; FSDP2 puts one of its own in front."""
    kinds = type(module).__mro__
    return next(k for k in kinds if issubclass(k, nn.Module) and not issubclass(k, FSDPModule))


def _parameter_rows(model: nn.Module, engine: ZeroEngine) -> list[Row]:
    """Parameters of one layout in one row, layers' numbers as a star."""
    stages = {name: engine.stages.get(module) for name, module in model.named_modules()}
    numbers: dict[Row, int] = {}
    ranks_of: dict[DeviceMesh, str] = {}  # DeviceMesh takes long to list them
    for name, found in model.named_parameters():
        parameter = engine.parameters.get(name)
        units = [stages[unit] for unit in _enclosing(name) if stages.get(unit) is not None]
        if parameter is None or not isinstance(found, DTensor) or not units:
            raise TypeError(f"{name} is in no ZeRO unit: parallel/plan.py has left it out")
        mesh = parameter.device_mesh
        if mesh not in ranks_of:
            ranks_of[mesh] = _summed_over(mesh)
        row = (
            re.sub(r"\.\d+\.", ".*.", name),
            _shape(parameter.shape),
            _shape(local_part(parameter).shape),
            _split(parameter),
            str(units[0]),
            ranks_of[mesh] if parameter.requires_grad else "none: frozen",
        )
        numbers[row] = numbers.get(row, 0) + 1
    return [(pattern, str(number), *rest) for (pattern, *rest), number in numbers.items()]


def _enclosing(name: str) -> Iterable[str]:
    """Names of the modules around a parameter, the nearest first; '' is the model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _split(parameter: DTensor) -> str:
    mesh = parameter.device_mesh
    parts = [
        f"copy on {axis}={size}"
        if placement.is_replicate()
        else f"dim {placement.dim} over {axis}={size}"
        for axis, size, placement in _axes(mesh, parameter.placements)
        if size > 1
    ]
    return ", ".join(parts) or "whole"


def _summed_over(mesh: DeviceMesh) -> str:
    ranks, coordinate = mesh.mesh, mesh.get_coordinate()
    assert coordinate is not None
    for dim, (axis, _, place) in enumerate(_axes(mesh, coordinate)):
        if axis in EXPERT_AXES:
            ranks = ranks.narrow(dim, place, 1)
    return name_ranks(ranks.flatten().tolist())


def _axes(mesh: DeviceMesh, values: Iterable[Any]) -> list[tuple[str, int, Any]]:
    """(name, size, value) of each axis."""
    assert mesh.mesh_dim_names is not None
    return list(zip(mesh.mesh_dim_names, mesh.shape, values, strict=True))


def _table(rows: Sequence[Row]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
