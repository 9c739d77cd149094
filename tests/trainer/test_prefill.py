"""A text read in pieces gives what it gives in one."""

from typing import Any

import pytest
import torch
from support.tiny import VOCAB_SIZE, tiny_model
from support.worlds import run_world
from torch import Tensor

from fulmen.kernels.cross_entropy.op import IGNORE_INDEX
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.init import init_model
from fulmen.models.layers import Cache, KeyValues
from fulmen.models.text import TextModel
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import build_mesh
from fulmen.parallel.plan import parallelize
from fulmen.trainer.generate import generate
from fulmen.trainer.prefill import Piece, Reader, plan_pieces

IN_CHUNKS = {"activation_checkpointing": "full", "chunk_tokens": 16}
SHAPE = {"num_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(dtype: torch.dtype = torch.float64, **shape: int) -> TextModel:
    config = tiny_model(**(SHAPE | shape))
    model = TextModel(config, MoEConfig(capacity_factor=0.5))
    init_model(model, config, seed=1)
    return model.to(dtype).requires_grad_(False).eval()


def text(tokens: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (tokens,), generator=torch.Generator().manual_seed(2))


def one_shot_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").float()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 65, 199, 200, 1000])
def test_as_in_one_piece(chunk_tokens: int) -> None:
    model, ids = make_model(), text(200)
    whole = model(ids[None])[0]
    reader = Reader(model, chunk_tokens=chunk_tokens)
    logits, cache = reader.read(ids, num_logits=9)
    assert logits.shape == (9, VOCAB_SIZE)
    assert (logits - whole[-9:]).abs().max() < 1e-11
    assert (reader.losses(ids) - one_shot_losses(whole, ids)).abs().max() < 1e-6
    assert cache.num_tokens == 200
    assert sorted(cache.states) == [0, 2, 4]
    assert {layer: kv.num_tokens for layer, kv in cache.keys_values.items()} == {1: 200, 3: 200}


@pytest.mark.parametrize("softmax_every", [0, 1])
def test_one_kind_of_layer(softmax_every: int) -> None:
    model, ids = make_model(torch.float32, softmax_every=softmax_every), text(100)
    logits, _ = Reader(model, chunk_tokens=33).read(ids)
    torch.testing.assert_close(logits[0], model(ids[None])[0, -1], rtol=1e-5, atol=1e-5)


def test_new_tokens_behind_a_text() -> None:
    model, ids = make_model(), text(60)
    whole = model(ids[None])[0]
    reader = Reader(model, chunk_tokens=16)
    _, cache = reader.read(ids[:50])
    for token in range(50, 60):
        logits = reader.step(ids[token : token + 1], cache)
        assert (logits - whole[token]).abs().max() < 1e-11


def test_generation_does_not_depend_on_the_pieces() -> None:
    model = make_model(torch.float32)
    made = [
        generate(
            model,
            text(40).tolist(),
            max_new_tokens=12,
            temperature=0.0,
            top_k=None,
            generator=torch.Generator(),
            chunk_tokens=chunk_tokens,
        )
        for chunk_tokens in (1, 11, 40)
    ]
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 12


def test_keys_lie_where_they_were_put() -> None:
    held, twin = KeyValues(capacity=10), Cache().of_layer(0)
    parts = [torch.randn(1, n, 2, 4) for n in (4, 6, 1, 9, 50)]
    for kv in (held, twin):
        kv.append(parts[0], -parts[0])
    first = held.views()[0].data_ptr()
    held.append(parts[1], -parts[1])
    twin.append(parts[1], -parts[1])
    assert held.views()[0].data_ptr() == first  # room for 10 was made at once
    for part in parts[2:]:
        for kv in (held, twin):
            kv.append(part, -part)
    for kv in (held, twin):
        assert kv.num_tokens == 70
        assert torch.equal(kv.views()[0], torch.cat(parts, 1))
        assert torch.equal(kv.views()[1], -torch.cat(parts, 1))


def test_losses_of_tokens_sum_to_the_loss() -> None:
    model, ids = make_model(torch.float32), text(50)
    labels = ids.roll(-1)
    labels[20:23] = IGNORE_INDEX
    losses = model(ids[None], labels=labels[None], per_token=True)
    assert losses.shape == (1, 50)
    assert torch.equal(losses[0, 20:23], torch.zeros(3))
    total = model(ids[None], labels=labels[None]).loss_sum
    torch.testing.assert_close(losses.sum(), total, rtol=1e-5, atol=0)


def test_pieces_of_ranks() -> None:
    pieces = plan_pieces(103, chunk_tokens=40, ranks=4, num_logits=5)
    assert pieces == [
        Piece(0, 40, False),
        Piece(40, 80, False),
        Piece(80, 96, False),
        Piece(96, 103, True),
    ]
    assert plan_pieces(3, chunk_tokens=2, ranks=4, num_logits=8) == [
        Piece(0, 2, True),
        Piece(2, 3, True),
    ]
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        Reader(make_model(), chunk_tokens=0)


def read_over_ranks(
    device: torch.device,
    parallel: ParallelConfig,
    chunk_tokens: int,
    tokens: int,
    training: dict[str, Any],
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """Logits, losses, logits of two more tokens, and keys that this rank holds of a layer."""
    config: ModelConfig = tiny_model(**SHAPE)
    mesh = build_mesh(parallel, device)
    with torch.device("meta"):
        model = TextModel(config, MoEConfig())
    parallelize(
        model,
        mesh,
        parallel,
        dtype=torch.float32,
        compile_blocks=False,
        seed=1,
        **training,
    )
    model.eval()
    ids = text(tokens)
    reader = Reader(model, chunk_tokens=chunk_tokens, mesh=mesh)
    # A rank of another row reads less, and so fewer pieces.
    own = ids[: tokens - 20 * mesh.dp_rank]
    passes = reader.passes(tokens, num_logits=3)
    logits, cache = reader.read(own, num_logits=3, passes=passes)
    more = [reader.step(torch.tensor([token]), cache) for token in (5, 6)]
    losses = reader.losses(own, passes=reader.passes(tokens - 1))
    return logits, losses, more, cache.keys_values[1].num_tokens


@pytest.mark.parametrize(
    ("parallel", "size", "chunk_tokens", "training"),
    [
        (ParallelConfig(cp=2), 2, 30, {}),
        (ParallelConfig(cp=4), 4, 64, {}),
        (ParallelConfig(cp=2, zero_stage=3), 4, 50, {}),
        (ParallelConfig(cp=2, ep=2), 4, 31, {}),
        (ParallelConfig(), 2, 40, {}),
        (ParallelConfig(cp=2), 2, 60, IN_CHUNKS),
        (ParallelConfig(ep=2), 2, 40, IN_CHUNKS),
    ],
    ids=[
        "cp 2",
        "cp 4",
        "cp 2, dp 2, zero 3",
        "cp 2, ep 2",
        "dp 2",
        "trained in chunks",
        "ep 2, trained in chunks",
    ],
)
def test_ranks_read_one_text_together(
    parallel: ParallelConfig, size: int, chunk_tokens: int, training: dict[str, Any]
) -> None:
    tokens = 151
    model = make_model(torch.float32)
    training = {"activation_checkpointing": "none"} | training
    results = run_world(read_over_ranks, size, parallel, chunk_tokens, tokens, training)
    for rank, (logits, losses, more, held) in enumerate(results):
        ids = text(tokens)[: tokens - 20 * (rank // parallel.cp)]
        whole = model(torch.cat([ids, torch.tensor([5, 6])])[None])[0]
        end = len(ids)
        torch.testing.assert_close(logits, whole[end - 3 : end], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(more), whole[end:], rtol=1e-5, atol=1e-5)
        want = one_shot_losses(whole[:end], ids)
        torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
        assert held <= len(ids) // parallel.cp + 2 + 3 + parallel.cp  # its share, and shared ones
