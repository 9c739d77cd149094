"""Checksums see every change; the ranks that differ are named, on all meshes and ZeRO stages."""

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_engine
from support.worlds import run_world
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fulmen.parallel import replicas
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import release_groups
from fulmen.parallel.replicas import HOST, checksum, describe, find_difference, replicated
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.config import OptimConfig
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.restore import trained_tensors

HEAD = "lm_head.weight"
W1 = "layers.1.block_sparse_moe.experts.w1"
MESHES = {
    "all kept": ParallelConfig(cp=2, ep=2, zero_stage=0),
    "experts alone kept": ParallelConfig(cp=4, etp=2, zero_stage=3, expert_zero_stage=0),
    "all gathered": ParallelConfig(ep=2, zero_stage=2, expert_zero_stage=3),
}


KEPT = {
    "all kept": (True, True),
    "experts alone kept": (False, True),
    "all gathered": (False, False),
}
"""Whether head and experts are kept by more than one rank."""
_HEAD_2 = f"rank 2 differs from ranks 0-1, 3 in model.{HEAD}"
_PAIR = "ranks 1, 3 differ, with no majority, in"
TOLD = {
    "all kept": {
        "head": _HEAD_2,
        "moment of an expert": f"{_PAIR} exp_avg_sq.{W1}",
        "both": f"{_HEAD_2}; {_PAIR} model.{W1}",
        f"gathered {HEAD}": None,
        f"gathered {W1}": None,
    },
    "experts alone kept": {
        "head": None,  # the one copy that there is
        "moment of an expert": f"{_PAIR} exp_avg_sq.{W1}",
        "both": f"{_PAIR} model.{W1}",
        f"gathered {HEAD}": f"rank 1 differs from ranks 0, 2-3 in gathered {HEAD}",
        f"gathered {W1}": None,
    },
    "all gathered": {
        "head": None,
        "moment of an expert": None,
        "both": None,
        f"gathered {HEAD}": f"rank 1 differs from ranks 0, 2-3 in gathered {HEAD}",
        f"gathered {W1}": f"ranks 0, 2 differ, with no majority, in gathered {W1}",
    },
}
"""By mesh and by what was flipped."""


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_every_bit_and_every_swap(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "BLOCK", 16)  # several, the last one not full
    x = torch.randn(7, 9, dtype=dtype, generator=torch.Generator().manual_seed(1))
    width = 8 * x.element_size()
    kind = {16: torch.int16, 32: torch.int32}[width]
    numbers = x.view(-1).view(kind).tolist()
    by_hand = sum((2 * place + 1) * number for place, number in enumerate(numbers)) % 2**64
    whole = int(checksum(x))
    assert whole % 2**64 == by_hand
    assert int(checksum(x.clone().t().contiguous().t())) == whole  # by place, not by address
    for index in range(x.numel()):
        for bit in range(width):
            changed = x.clone()
            changed.view(-1).view(kind)[index] ^= (1 << bit) - (
                1 << width if bit == width - 1 else 0
            )
            assert int(checksum(changed)) != whole
        swapped = x.clone().view(-1)
        swapped[[index, index - 1]] = swapped[[index - 1, index]]
        assert int(checksum(swapped)) != whole
    assert int(checksum(x[:0])) == 0


@pytest.mark.fast
def test_the_majority_is_right() -> None:
    everyone, pairs = (0, 1, 2, 3), [(0, 2), (1, 3), (0, 2), (1, 3)]

    def told(hosts: str, a: str, b: str) -> str:
        return describe(
            [
                {
                    HOST: (everyone, ord(hosts[rank])),
                    "a": (everyone, ord(a[rank])),
                    "b": (pairs[rank], ord(b[rank])),
                }
                for rank in range(4)
            ]
        )

    assert told("xxxx", "xxxx", "xyxy") == ""
    assert told("xxxx", "xxyx", "xxxx") == "rank 2 differs from ranks 0-1, 3 in a"
    assert told("xxyx", "xxyx", "xxxx") == f"rank 2 differs from ranks 0-1, 3 in {HOST} and 1 more"
    assert told("xxxx", "xxyy", "xxxx") == "ranks 0-3 differ, with no majority, in a"
    assert told("xxxx", "xyyz", "xxyx") == (
        "ranks 0-3 differ, with no majority, in a; ranks 0, 2 differ, with no majority, in b"
    )


def flip(local: Tensor) -> None:
    """A bit in the middle, in place."""
    words = local.view(-1).view({2: torch.int16, 4: torch.int32}[local.element_size()])
    words[len(words) // 2] ^= 64


@contextmanager
def flipped_when_gathered(engine: ZeroEngine, name: str, rank: int) -> Iterator[None]:
    """On one rank, each time that the unit of a parameter is gathered."""
    unshard = FSDPModule.unshard

    def flipping(unit: FSDPModule) -> None:
        unshard(unit)
        whole = engine.model.get_parameter(name)
        gathered = whole.shape if not isinstance(whole, DTensor) else whole.to_local().shape
        if engine.mesh.rank == rank and gathered != engine.parameters[name].to_local().shape:
            flip((whole.to_local() if isinstance(whole, DTensor) else whole).detach())

    FSDPModule.unshard = flipping  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FSDPModule.unshard = unshard  # type: ignore[method-assign]


def hold_the_same(x: Tensor) -> tuple[int, ...]:
    """Ranks whose tensor has the bytes of this one's."""
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hashlib.sha256(x.float().numpy().tobytes()).hexdigest())
    return tuple(rank for rank, one in enumerate(hashes) if one == hashes[dist.get_rank()])


def on_a_mesh(device: torch.device, parallel: ParallelConfig) -> dict[str, Any]:
    _, engine = tiny_engine(device, parallel, dtype=torch.bfloat16)
    tensors = trained_tensors(engine, Optimizer(engine, OptimConfig(lr=1.0)))
    rank, kept = engine.mesh.rank, replicated(tensors)

    def look(host: int = 5) -> str | None:
        return find_difference(kept, host, engine)

    def after(*changes: tuple[str, int]) -> str | None:
        locals_ = [(tensors[name].to_local().detach(), where) for name, where in changes]
        for local, where in locals_:
            flip(local) if rank == where else None
        found = look()
        for local, where in locals_:
            flip(local) if rank == where else None
        return found

    found: dict[str, Any] = {"kept": sorted(kept), "at first": look()}
    # The initial values are random: ranks with the same bytes have the same part.
    found["same bytes"] = {
        name: hold_the_same(tensors[name].to_local()) for name in (f"model.{HEAD}", f"model.{W1}")
    }
    found["same part"] = dict.fromkeys(found["same bytes"], (rank,)) | {
        copy.name: copy.ranks for copy in replicas._kept(kept) if copy.name in found["same bytes"]
    }
    found["host"] = look(5 + (rank == 1))
    found["head"] = after((f"model.{HEAD}", 2))
    found["moment of an expert"] = after((f"exp_avg_sq.{W1}", 3))
    found["both"] = after((f"model.{HEAD}", 2), (f"model.{W1}", 3))
    for name, where in ((HEAD, 1), (W1, 2)):
        with flipped_when_gathered(engine, name, where):
            found[f"gathered {name}"] = look()
    found["at last"] = look()
    return found


def on_all_meshes(device: torch.device) -> dict[str, dict[str, Any]]:
    """One after the other, as stages are, and one of them twice: its groups are others then."""
    found = {}
    for name in ("all kept", *MESHES):
        found[name] = on_a_mesh(device, MESHES[name])
        gc.collect()
        release_groups()
    return found


@pytest.mark.slow
def test_ranks_and_tensor_are_named_on_all_meshes() -> None:
    ranks = run_world(on_all_meshes, 4)
    for mesh, expected in TOLD.items():
        for rank, found in enumerate(one[mesh] for one in ranks):
            assert found.pop("same part") == found.pop("same bytes"), (mesh, rank)
            shared = found.pop("kept")
            assert (f"model.{HEAD}" in shared, f"exp_avg.{W1}" in shared) == KEPT[mesh]
            assert found.pop("at first") is None
            assert found.pop("at last") is None
            assert found.pop("host") == f"rank 1 differs from ranks 0, 2-3 in {HOST}"
            assert found == expected, (mesh, rank)
