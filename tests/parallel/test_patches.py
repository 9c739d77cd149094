"""Images over ranks: who runs which tiles, which patches travel, and training equal to one rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_model
from support.worlds import run_world
from torch import Tensor, nn

from fulmen.data.image_batches import PackedImages
from fulmen.data.packing import PackedBatch
from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig
from fulmen.models.image_layout import NEWLINE, ImageLayout, image_layout, place_images, tile_range
from fulmen.models.init import init_model
from fulmen.models.text import LossOutput, TextModel
from fulmen.models.vl import build_model
from fulmen.parallel import patches
from fulmen.parallel.audit import audit
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.patches import plan_patches
from fulmen.parallel.plan import parallelize
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.inputs import check_images, model_inputs

VISION = VisionConfig(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=2,
    mlp_hidden_size=20,
    tile_size=8,
    patch_size=4,
    image_token_id=7,
    max_tiles_per_side=3,
    max_tiles=4,
)
RELATIVE = 1e-5
Placed = list[tuple[int, ImageLayout]]


# The plan alone.


@st.composite
def rows(draw: st.DrawFn) -> tuple[Placed, int, int]:
    """Images with gaps between them, ranks, and tokens of a rank's part."""
    placed, at = [], 0
    side = st.integers(8, 30)
    for size in draw(st.lists(st.tuples(side, side), max_size=5)):
        at += draw(st.integers(0, 9))
        placed.append((at, image_layout(*size, VISION.tiling)))
        at += placed[-1][1].num_tokens
    ranks = draw(st.integers(1, 5))
    return placed, ranks, -(-(at + draw(st.integers(0, 30)) + 1) // ranks)


@given(rows())
@settings(deadline=None, max_examples=300)
@pytest.mark.fast
def test_every_token_gets_the_patch_that_it_shows(row: tuple[Placed, int, int]) -> None:
    placed, size, tokens = row
    places, sources = place_images(placed)
    wanted = dict(zip(places.tolist(), sources.tolist(), strict=True))
    plans = [plan_patches(placed, rank, size, tokens) for rank in range(size)]
    per_tile, num_tiles = VISION.tiling.patches_per_tile, sum(x.num_tiles for _, x in placed)

    # All tiles once, in order, in shares that differ by one.
    assert [plan.tiles[0] for plan in plans] + [num_tiles] == [0] + [p.tiles[1] for p in plans]
    shares = [end - begin for begin, end in (plan.tiles for plan in plans)]
    assert max(shares) - min(shares) <= 1

    # What an all-to-all does, with the patch's number in place of its features.
    arrived: list[list[int]] = [[] for _ in plans]
    for sender, plan in enumerate(plans):
        assert [other.receive[sender] for other in plans] == plan.send
        numbers = iter((plan.rows + per_tile * plan.tiles[0]).tolist())
        assert not len(plan.rows) or plan.rows.max() < per_tile * shares[sender]
        for receiver, count in enumerate(plan.send):
            arrived[receiver] += [next(numbers) for _ in range(count)]
        assert next(numbers, None) is None
    found = {}
    for rank, plan in enumerate(plans):
        assert plan.places.dtype == plan.sources.dtype == plan.rows.dtype == np.int64
        for place, source in zip(plan.places.tolist(), plan.sources.tolist(), strict=True):
            assert 0 <= place < tokens
            found[rank * tokens + place] = arrived[rank][source] if source >= 0 else NEWLINE
    assert found == wanted
    # Nothing but what is shown has travelled, each patch once.
    assert sorted(chain(*arrived)) == sorted(s for s in wanted.values() if s != NEWLINE)


# Training on several ranks.


def vl_model() -> ModelConfig:
    config = tiny_model()
    config.vision = VISION
    return config


Document = tuple[int, list[tuple[int, int]]]
"""Tokens of text before, between and behind the images, and the sizes of these."""
ROW = 96
ROWS: list[list[Document]] = [
    [(3, [(16, 16), (9, 30)]), (1, []), (5, [(20, 8)])],  # 5, 4 and 4 tiles, over cut points
    [(40, []), (9, [(8, 8)])],  # 2 tiles: of four ranks two have none, and three no image token
    [(30, []), (40, [])],  # none at all
    [(60, []), (0, [(24, 8)]), (4, [])],  # as a document of its own
]
"""Of a step; a micro-batch each."""


def micro_batch(number: int) -> tuple[PackedBatch, Placed, Tensor]:
    """A packed row, its images, and all of their tiles."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(8, 301, (ROW,), generator=generator)
    placed: Placed = []
    at, bounds = 0, [0]
    for text, sizes in ROWS[number]:
        at += text
        for size in sizes:
            layout = image_layout(*size, VISION.tiling)
            placed.append((at, layout))
            ids[at : at + layout.num_tokens] = VISION.image_token_id
            at += layout.num_tokens + text
        bounds.append(at)
    assert at <= ROW
    labels = ids.roll(-1)
    labels[torch.tensor(bounds[1:]) - 1] = -100
    labels[labels == VISION.image_token_id] = -100
    labels[at:] = -100
    num_tiles = sum(layout.num_tiles for _, layout in placed)
    tiles = torch.randint(256, (num_tiles, 3, 8, 8), generator=generator, dtype=torch.uint8)
    bounds += [ROW] if at < ROW else []
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedBatch(ids[None], labels[None], cu_seqlens, at), placed, tiles


def batch_of(number: int, part: int, num_parts: int) -> PackedBatch:
    """As the loader gives it: `images` None where it is None of a source without images."""
    batch, placed, tiles = micro_batch(number)
    images = None
    if placed:
        begin, end = tile_range(len(tiles), part, num_parts)
        stored: Any = tuple(SimpleNamespace(first=at, layout=layout) for at, layout in placed)
        images = PackedImages(stored, tiles[begin:end], begin)
    return PackedBatch(batch.input_ids, batch.labels, batch.cu_seqlens, batch.num_tokens,
                       images=images)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to spread it."""

    size: int
    parallel: ParallelConfig
    checkpointing: str = "none"
    broken: str = ""

    def __str__(self) -> str:
        p = self.parallel
        return f"{self.size}-cp{p.cp}-ep{p.ep}-z{p.zero_stage}-{self.checkpointing}{self.broken}"


CASES = [
    Case(1, ParallelConfig(zero_stage=1), "selective"),
    Case(2, ParallelConfig(cp=2, zero_stage=1)),
    Case(2, ParallelConfig(cp=2, zero_stage=3), "full"),
    Case(2, ParallelConfig(zero_stage=2), "selective"),
    Case(2, ParallelConfig(ep=2, zero_stage=3)),
    Case(4, ParallelConfig(cp=4, zero_stage=2), "full"),
    Case(4, ParallelConfig(cp=2, ep=2, zero_stage=3), "selective"),
    Case(4, ParallelConfig(cp=2, ep=4, zero_stage=0, softmax_attention="ring")),
]
BROKEN = [
    Case(2, ParallelConfig(cp=2), broken="forward"),
    Case(2, ParallelConfig(cp=2), broken="backward"),
]
Gradients = dict[str, Tensor]


def add_gradients(model: TextModel, batches: Sequence[PackedBatch], mesh: Any, labels: int) -> Any:
    total = torch.zeros((), dtype=torch.float64)
    for index, batch in enumerate(batches):
        if isinstance(mesh, ZeroEngine):
            mesh.begin_micro_batch(is_last=index == len(batches) - 1)
        where = mesh.mesh if isinstance(mesh, ZeroEngine) else mesh
        output = model(**model_inputs(batch, where, model.config.vision))
        assert isinstance(output, LossOutput)
        (output.loss_sum / labels + 0.05 * output.aux_loss / len(ROWS)).backward()
        total += output.loss_sum.detach().double() / labels
    return total


def scale(name: str, values: Tensor) -> None:
    """Biases that are not 0, so that nothing is left out unnoticed."""
    if name.endswith(".bias"):
        values.fill_(0.1)


@cache
def reference() -> tuple[float, Gradients]:
    """The same on one rank with nothing of `parallel`."""
    model = build_model(vl_model(), MoEConfig())
    init_model(model, vl_model(), 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale(name, parameter)
    alone: Any = SimpleNamespace(cp=1, cp_rank=0, device=torch.device("cpu"))
    batches = [batch_of(number, 0, 1) for number in range(len(ROWS))]
    loss = add_gradients(model, batches, alone, num_labels())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def num_labels() -> int:
    return sum(int((micro_batch(n)[0].labels != -100).sum()) for n in range(len(ROWS)))


def train(device: torch.device, cases: list[Case]) -> list[tuple[float, Gradients, str]]:
    results = []
    for case in cases:
        mesh = build_mesh(case.parallel, device)
        with torch.device("meta"):
            model = build_model(vl_model(), MoEConfig())
        engine = parallelize(
            model,
            mesh,
            case.parallel,
            dtype=torch.float32,
            activation_checkpointing=case.checkpointing,
            compile_blocks=False,
            seed=5,
        )
        for name, parameter in engine.parameters.items():
            scale(name, parameter.to_local().detach())
        if case.broken:
            patches._exchange = breaking(case.broken)
        numbers = range(mesh.dp_rank, len(ROWS), mesh.dp)
        batches = [batch_of(number, mesh.cp_rank, mesh.cp) for number in numbers]
        loss = add_gradients(model, batches, engine, num_labels())
        dist.all_reduce(loss)
        gradients = {}
        for name, parameter in engine.parameters.items():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.full_tensor().clone()
        results.append((loss.item(), gradients, audit(model, engine, case.parallel)))
    return results


def breaking(direction: str) -> Any:
    """An exchange that brings zeros in one direction."""
    whole = patches._exchange

    def broken(name: str, *args: Any) -> Tensor:
        arriving = whole(name, *args)
        backward = name.startswith("gradients")
        return arriving.zero_() if backward == (direction == "backward") else arriving

    return broken


@cache
def trained(size: int, broken: str = "") -> dict[str, list[tuple[float, Gradients, str]]]:
    cases = [case for case in [*CASES, *BROKEN] if (case.size, case.broken) == (size, broken)]
    by_rank = run_world(train, size, cases)
    return {str(case): [results[index] for results in by_rank] for index, case in enumerate(cases)}


def far(case: Case) -> list[str]:
    """What differs from one rank: parameters, and "loss"."""
    loss, wanted = reference()
    names = []
    for found, gradients, _ in trained(case.size, case.broken)[str(case)]:
        assert gradients.keys() == wanted.keys()
        if abs(found - loss) > RELATIVE * abs(loss):
            names.append("loss")
        for name, gradient in wanted.items():
            size = gradient.norm()
            if name.endswith("k_proj.bias"):  # 0 but for rounding: it adds alike to all of a query
                size = wanted[name.removesuffix("bias") + "weight"].norm()
            if (gradients[name] - gradient).norm() > RELATIVE * size:
                names.append(name)
    return names


def test_the_reference_trains_every_part() -> None:
    _, gradients = reference()
    for name, gradient in gradients.items():
        assert gradient.norm() > (0 if name.endswith("k_proj.bias") else 1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_one_rank(case: Case) -> None:
    assert far(case) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_both_directions_matter(case: Case) -> None:
    names = set(far(case))
    tower = {name for name in reference()[1] if name.startswith("vision_tower.")}
    assert {name for name in tower if not name.endswith("k_proj.bias")} <= names
    assert ("loss" in names) == (case.broken == "forward")


@pytest.mark.fast
def test_the_rows_are_those_that_are_hard() -> None:
    """Tiles and image tokens by rank of four, so that what the cases are for is in them."""
    tiles, tokens = [], []
    for number in range(len(ROWS)):
        _, placed, _ = micro_batch(number)
        plans = [plan_patches(placed, rank, 4, ROW // 4) for rank in range(4)]
        tiles.append([end - begin for begin, end in (plan.tiles for plan in plans)])
        tokens.append([len(plan.places) for plan in plans])
    assert [sum(row) for row in tiles] == [13, 2, 0, 4]
    assert min(tiles[1]) == 0
    assert tokens[2] == [0] * 4
    assert min(tokens[1]) == min(tokens[3]) == 0
    cuts = [24, 48, 72]
    crossing = [
        at for at, layout in micro_batch(0)[1] for cut in cuts if at < cut < at + layout.num_tokens
    ]
    assert len(crossing) >= 2


@pytest.mark.slow
def test_the_audit_knows_the_tower() -> None:
    tables = [rows[0][2] for rows in trained(2).values()]
    for case, table in zip([case for case in CASES if case.size == 2], tables, strict=True):
        cells = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()]
        shared = case.parallel.cp > 1
        plan = "tiles in equal shares, patches to their tokens" if shared else "all on one rank"
        assert ["VisionLanguageModel", "1", plan, "-"] in cells
        assert ["VisionAttention", "2", "within a tile", "-"] in cells
        assert ["VisionEmbeddings", "1", "within a tile", "-"] in cells
        assert ["LayerNorm", "5", "each by itself", "-"] in cells
        stage = str(case.parallel.zero_stage)
        rows = [row for row in cells if row[0].startswith(("vision_", "multi_", "image_"))]
        assert len(rows) > 15
        assert all(row[-2:] == [stage, "ranks 0-1"] for row in rows), rows


@pytest.mark.fast
def test_images_left_local_and_layers_unknown_stop_the_run(one_rank: torch.device) -> None:
    config = ParallelConfig()
    with torch.device("meta"):
        model = build_model(vl_model(), MoEConfig())
    engine = parallelize(
        model,
        build_mesh(config, one_rank),
        config,
        dtype=torch.float32,
        activation_checkpointing="none",
        compile_blocks=False,
        seed=0,
    )
    for name, module in model.named_modules():
        for seam in ("begin", "attend", "count_over_row"):
            if name and hasattr(type(module), seam):
                setattr(module, seam, getattr(module, seam))
    with pytest.raises(TypeError, match=r"\(VisionLanguageModel\) shows patches.*`collect`"):
        audit(model, engine, ParallelConfig(cp=2))

    class Pooling(nn.Module): ...

    model.vision_tower.vision_model.pooling = Pooling()
    with pytest.raises(TypeError, match=r"vision_tower\.vision_model\.pooling \(Pooling\)"):
        audit(model, engine, config)


@pytest.mark.fast
def test_images_that_the_model_cannot_see_are_an_error() -> None:
    def split(**changes: Any) -> Any:
        tiling = SimpleNamespace(tile_size=8, patch_size=4)
        index = SimpleNamespace(tiling=tiling, special_ids={"image": 7})
        vars(tiling).update(changes)
        return SimpleNamespace(name="docs", path="/data", images=index)

    check_images([split(), SimpleNamespace(images=None)], VISION)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"data\.sources\.docs: /data has images.*model\.vision"):
        check_images([split()], None)
    with pytest.raises(ValueError, match=r"model\.vision\.patch_size=4.*prepared with 2"):
        check_images([split(patch_size=2)], VISION)
