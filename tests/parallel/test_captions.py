"""CoCa on several ranks equals one rank with all pairs."""

from dataclasses import replace

import pytest
import torch
from support.captioned import pairs, tiny_coca
from support.worlds import run_world

from fulmen.models.coca import CoCaLosses
from fulmen.models.config import MoEConfig
from fulmen.models.vl import build_model
from fulmen.parallel.audit import audit
from fulmen.parallel.captions import gather_rows
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize

COUNT = 10
SHARES = {1: [(0, 10)], 2: [(0, 7), (7, 10)], 4: [(0, 3), (3, 3), (3, 9), (9, 10)]}
"""First and end of each rank's pairs; one rank of four has none."""


def step(
    device: torch.device, stage: int, policy: str, offload_checkpoints: bool = False
) -> tuple[dict, str]:
    """Losses, gradients and their norm of one micro-batch."""
    config = ParallelConfig(zero_stage=stage)
    mesh = build_mesh(config, device)
    with torch.device("meta"):
        model = build_model(tiny_coca(), MoEConfig())
    engine = parallelize(
        model,
        mesh,
        config,
        dtype=torch.float32,
        activation_checkpointing=policy,
        compile_blocks=False,
        seed=2,
        offload_checkpoints=offload_checkpoints,
    )
    tables = audit(model, engine, config)
    pixels, captions = pairs(COUNT)
    assert captions.labels is not None
    first, end = SHARES[mesh.world_size][mesh.rank]
    labels = captions.labels.clone()
    labels[end:] = -100
    rows = slice(first, max(end, first + 1))  # a rank without pairs has a row that does not count
    here = replace(
        captions,
        input_ids=captions.input_ids[rows],
        lengths=captions.lengths[rows],
        labels=labels[rows],
        count=end - first,
    )
    engine.begin_micro_batch(is_last=True)
    output = model(pixels[rows], here, room=COUNT)
    assert isinstance(output, CoCaLosses)
    (2 * output.caption_loss_sum / 40 + output.contrastive_loss_sum / COUNT).backward()
    sums = torch.stack([part.double() for part in output[:3]]).detach()
    torch.distributed.all_reduce(sums)
    found = {"sums": sums, "norm": engine.clip_grad_norm(None)}
    for name, parameter in engine.parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor()  # type: ignore[attr-defined]
    return found, tables


def steps(device: torch.device, cases: list[tuple[int, str]]) -> list[tuple[dict, str]]:
    return [step(device, *case) for case in cases]


def test_ranks_equal_one() -> None:
    ((wanted, _),) = run_world(steps, 1, [(0, "none")])[0]
    largest = max(float(g.abs().max()) for name, g in wanted.items() if name != "sums")
    for size, cases in {
        2: [(0, "none"), (1, "selective"), (2, "full"), (3, "none")],
        4: [(3, "full"), (1, "none")],
    }.items():
        for case, (got, tables) in zip(cases, run_world(steps, size, cases)[0], strict=True):
            torch.testing.assert_close(got["sums"], wanted["sums"], rtol=1e-5, atol=0)
            for name in wanted.keys() - {"sums"}:
                error = (got[name] - wanted[name]).abs().max()
                assert error <= 1e-5 * largest, (size, *case, name)
            assert ("embeddings of all ranks" in tables) == (size > 1)


def broken(device: torch.device) -> float:
    """Largest difference of a gradient, were those of other ranks' losses left out."""
    rows = torch.arange(6.0, device=device).view(3, 2) + 10 * torch.distributed.get_rank()
    rows.requires_grad_()
    group = torch.distributed.group.WORLD
    everyone, first = gather_rows(group, rows)
    assert torch.equal(everyone[first : first + 3], rows)
    weights = torch.arange(6.0).view(3, 2).repeat(2, 1) * (1 + torch.distributed.get_rank())
    (everyone * weights).sum().backward()
    assert rows.grad is not None
    return float((rows.grad - weights[:3]).abs().max())


@pytest.mark.fast
def test_gradients_come_from_all_ranks() -> None:
    """Each rank's rows get 1 + 2 times the weights."""
    assert run_world(broken, 2) == [10.0, 5.0]
