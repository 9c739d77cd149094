"""The order of copies to host memory and back, with stand-ins for the streams of a GPU."""

import gc
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from test_captions import step as caption_step
from test_checkpointing import one_step
from torch import Tensor

from fulmen.parallel import checkpointing, offload
from fulmen.parallel.offload import HostMemory, Offloaded, piece_sizes
from fulmen.trainer.config import RunConfig
from fulmen.trainer.host_memory import check_host, find_host_memory
from fulmen.trainer.memory import GIB, host_bytes

pytestmark = pytest.mark.fast


class Stream:
    """Lists what it is given; copies run at once."""

    def __init__(self, *_: object) -> None:
        self.waits: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: Any) -> None:
        self.waits.append(stream)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The compute stream of a GPU that is the CPU."""
    stream, empty = Stream(), torch.empty
    event = type("Event", (), {"record": lambda self, stream: None})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    return stream


def on_gpu(kept: Offloaded) -> bool:
    return kept._here is not None


def test_tensors_leave_and_come_back_one_ahead(
    compute: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "SMALLEST_PIECE", 16)
    host = HostMemory(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    values = [torch.randn(3, 5, requires_grad=n > 0, dtype=torch.bfloat16) for n in range(4)]
    buffers: list[list[int]] = []
    for _ in range(3):
        kept: list[Any] = []
        for x in values:
            kept.append(host.keep(x))
            kept[-1].leave()
            kept[-1].leave()  # whoever saves it says so again
            assert [on_gpu(one) for one in kept] == [False] * (len(kept) - 1) + [True]
            if len(kept) > 1:
                assert kept[-2]._copied in compute.waits  # before its memory was given up
        buffers.append(sorted(b.data_ptr() for one in kept for b in one._buffers))
        assert sum(b.nbytes for one in kept for b in one._buffers) == 4 * 32
        while kept:
            got = kept[-1].get()
            assert kept[-1]._copied in compute.waits
            assert [on_gpu(one) for one in kept[:-1]] == [False] * (len(kept) - 2) + [True] * (
                len(kept) > 1
            )
            assert torch.equal(kept[-1].get(), got)
            x = values[len(kept) - 1]
            assert torch.equal(got, x)
            assert got.requires_grad == x.requires_grad
            del got
            kept.pop()  # as the graph does behind a block
        gc.collect()
    assert buffers[0] == buffers[1] == buffers[2]  # no new ones


def test_one_behind_is_not_needed_any_more(compute: Stream) -> None:
    host = HostMemory(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    kept: list[Any] = [host.keep(torch.ones(2)) for _ in range(3)]
    for one in kept:
        one.leave()
    for number in (2, 1, 0):
        kept[number].get()
        assert [on_gpu(one) for one in kept] == [n in (number, number - 1) for n in range(3)]
    # Out of order it still comes.
    assert torch.equal(kept[2].get(), torch.ones(2))


@pytest.fixture
def hosts(compute: Stream, monkeypatch: pytest.MonkeyPatch) -> list[HostMemory]:
    """Those that models make, as on a GPU."""
    made: list[HostMemory] = []

    def make(_: torch.device) -> HostMemory:
        made.append(HostMemory(SimpleNamespace(type="cuda")))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(checkpointing, "HostMemory", make)
    return made


def test_a_captioner_by_way_of_the_host(one_rank: torch.device, hosts: list[HostMemory]) -> None:
    expected, _ = caption_step(one_rank, 1, "full")
    got, _ = caption_step(one_rank, 1, "full", offload_checkpoints=True)
    assert len(hosts) == 1
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("chunk_tokens", [None, 12])
def test_a_step_by_way_of_the_host(
    chunk_tokens: int | None, one_rank: torch.device, hosts: list[HostMemory]
) -> None:
    """A whole model, also of blocks that keep the output of softmax attention beside."""
    way = {"activation_checkpointing": "full", "chunk_tokens": chunk_tokens}
    parallel = {"zero_stage": 1}
    expected = one_step(one_rank, parallel, way, "float32", drops=True)
    got = one_step(one_rank, parallel, way | {"offload_checkpoints": True}, "float32", drops=True)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    (host,) = hosts
    gc.collect()
    inputs = 3 if chunk_tokens is None else 6  # of three blocks; two micro-batches share buffers
    assert [len(buffers) for buffers in host._free.values()] == [inputs]
    assert not host.leaving
    assert not host.arrived


@pytest.mark.parametrize("mib", [0.1, 1, 3, 3072, 3072.5])
def test_buffers_are_powers_of_two(mib: float) -> None:
    nbytes = int(mib * 2**20)
    sizes = list(piece_sizes(nbytes))
    assert all(size.bit_count() == 1 for size in sizes)
    assert nbytes <= sum(sizes) < nbytes + 2**20
    assert all(a > b for a, b in itertools.pairwise(sizes))


def offloading(chunk_tokens: int | None) -> RunConfig:
    config = tiny_config("none")
    config.trainer.activation_checkpointing = "full"
    config.trainer.offload_checkpoints = True
    config.trainer.chunk_tokens = chunk_tokens
    return config


def test_a_host_without_room_is_told() -> None:
    config = offloading(16)
    assert host_bytes(config) == 2 * 3 * 64 * 32 * 4  # two inputs of three blocks, fp32
    assert host_bytes(offloading(None)) == 3 * 64 * 32 * 4
    check_host(config, 2, int(2 * host_bytes(config) / 0.69))
    with pytest.raises(ValueError, match=r"trainer\.offload_checkpoints=true pins .* 2 rank"):
        check_host(config, 2, 3 * host_bytes(config) // 2)
    assert find_host_memory() > GIB / 2
    config.trainer.offload_checkpoints = False
    check_host(config, 8, 0)
