"""The model's own facts: partial RoPE, packed documents, the routers' losses, decoding, counts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fulmen.kernels.rope import rope
from fulmen.models.config import ModelConfig, MoEConfig, check_model
from fulmen.models.hf import released_layout
from fulmen.models.init import BLOCK_ELEMENTS, init_model, init_rows, init_std
from fulmen.models.layers import Cache, decay_slopes, rope_tables
from fulmen.models.moe import MoE
from fulmen.models.text import LossOutput, TextModel, count_active_parameters, count_parameters

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    num_experts_per_token=2,
    expert_hidden_size=12,
    vocab_size=40,
    softmax_every=2,
)
TEXT01 = ModelConfig(
    num_layers=80,
    hidden_size=6144,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rotary_dim=64,
    num_experts=32,
    num_experts_per_token=2,
    expert_hidden_size=9216,
    vocab_size=200_064,
)


def make_model(config: ModelConfig = SMALL, moe: MoEConfig | None = None) -> TextModel:
    """fp64, so that equalities are sharp; routers scaled up, so that they are not all alike."""
    model = TextModel(config, moe or MoEConfig())
    init_model(model, config, 0)
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            parameter.data *= 5
    return model.double()


def tokens_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(40, (1, length), generator=torch.Generator().manual_seed(seed))


def losses_of(model: TextModel, ids: Tensor, **arguments: object) -> LossOutput:
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    output = model(ids, labels=labels, **arguments)
    assert isinstance(output, LossOutput)
    return output


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# Partial RoPE.


def rotate_by_hand(x: Tensor, position: int, rotary_dim: int, theta: float) -> Tensor:
    """Dim i and dim i + rotary_dim / 2 are a complex number turned by its angle."""
    result = x.clone()
    half = rotary_dim // 2
    for i in range(half):
        turn = complex(math.cos(a := position * theta ** (-2 * i / rotary_dim)), math.sin(a))
        value = complex(x[i].item(), x[i + half].item()) * turn
        result[i], result[i + half] = value.real, value.imag
    return result


@pytest.mark.fast
@pytest.mark.parametrize(
    ("rotary_dim", "theta"), [(0, 1e4), (4, 1e4), (6, 1e7), (8, 1e4), (64, 1e7)]
)
def test_partial_rope(rotary_dim: int, theta: float) -> None:
    head_dim = max(8, 2 * rotary_dim) if rotary_dim == 64 else 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 2, head_dim, generator=generator, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 77, 8191])
    rotated = rope(x, *rope_tables(positions, rotary_dim, theta))
    for t, position in enumerate(positions.tolist()):
        for head in range(2):
            want = rotate_by_hand(x[0, t, head], position, rotary_dim, theta)
            # The tables are fp32: an angle of 8191 radians is good to 2^-12.
            tolerance = 1e-6 + position * 2**-23
            torch.testing.assert_close(rotated[0, t, head], want, rtol=0, atol=4 * tolerance)
    assert torch.equal(rotated[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.fast
def test_rope_turns_by_the_distance_alone_at_four_million() -> None:
    """Attention sees the difference of two positions' angles, wherever the two are."""
    far = torch.tensor([2**22 - 6, 2**22 - 1])
    cos, sin = (table.double() for table in rope_tables(far, 64, 1e7))
    near = rope_tables(torch.tensor([5]), 64, 1e7)[0][0].double()
    torch.testing.assert_close(cos[0] * cos[1] + sin[0] * sin[1], near, rtol=0, atol=1e-6)


@pytest.mark.fast
def test_softmax_layer_against_the_formula() -> None:
    """One whole layer with partial RoPE and grouped heads, fp64, position by position."""
    config = replace(SMALL, num_attention_heads=4, num_key_value_heads=2, softmax_every=1)
    model = make_model(replace(config, num_layers=1))
    layer = model.layers[0].self_attn
    x = torch.randn(1, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def heads(weight: Tensor) -> Tensor:
        return (x[0] @ weight.t()).view(9, -1, 8)

    q, k, v = (heads(w) for w in (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight))
    rows = []
    for t in range(9):
        out = []
        for head in range(4):
            query = rotate_by_hand(q[t, head], t, 4, 1e4)
            keys = torch.stack([rotate_by_hand(k[s, head // 2], s, 4, 1e4) for s in range(t + 1)])
            out.append((keys @ query / math.sqrt(8)).softmax(0) @ v[: t + 1, head // 2])
        rows.append(layer.o_proj.weight @ torch.cat(out))

    captured: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: captured.append(output))
    layer_input = model.layers[0].input_layernorm
    layer_input.forward = lambda _: x  # type: ignore[method-assign]
    model(tokens_of(9))
    handle.remove()
    torch.testing.assert_close(captured[0][0], torch.stack(rows), rtol=0, atol=1e-6)


# Packed documents.

LENGTHS = [1, 63, 64, 65, 7]


@pytest.mark.fast
@pytest.mark.parametrize("softmax_every", [0, 1, 2])
def test_packed_documents_equal_documents_alone(softmax_every: int) -> None:
    model = make_model(replace(SMALL, softmax_every=softmax_every))
    ids = tokens_of(sum(LENGTHS))
    packed = model(ids, cu_seqlens=bounds(LENGTHS))
    weight = torch.randn(packed.shape, dtype=torch.float64)
    (packed * weight).sum().backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    parts = list(zip(ids.split(LENGTHS, 1), weight.split(LENGTHS, 1), strict=True))
    alone = []
    for part, part_weight in parts:
        logits = model(part)
        (logits * part_weight).sum().backward()
        alone.append(logits)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-11)
    for name, parameter in model.named_parameters():
        scale = packed_gradients[name].abs().max()
        assert (parameter.grad - packed_gradients[name]).abs().max() <= 1e-10 * scale, name


@pytest.mark.fast
@pytest.mark.parametrize("poisoned", range(len(LENGTHS)))
def test_a_document_does_not_change_another_one(poisoned: int) -> None:
    """Neither logits nor gradients, through states, attention or positions."""
    model = make_model()
    clean = tokens_of(sum(LENGTHS))
    dirty = clean.clone()
    ends = bounds(LENGTHS).tolist()
    inside = slice(ends[poisoned], ends[poisoned + 1])
    dirty[:, inside] = (dirty[:, inside] + 17) % 40
    outside = torch.ones(clean.shape[1], dtype=torch.bool)
    outside[inside] = False
    results = []
    for ids in (clean, dirty):
        logits = model(ids, cu_seqlens=bounds(LENGTHS))[:, outside]
        model.zero_grad()
        logits.square().sum().backward()
        results.append((logits.detach(), model.layers[0].self_attn.qkv_proj.weight.grad.clone()))
    assert (results[0][0] - results[1][0]).abs().max() <= 1e-12
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-10)
    assert (
        model(clean, cu_seqlens=bounds(LENGTHS)) != model(dirty, cu_seqlens=bounds(LENGTHS))
    ).any()


@pytest.mark.fast
def test_without_boundaries_they_would_leak() -> None:
    """The test above can fail: the same documents in one sequence do change each other."""
    model = make_model()
    clean = tokens_of(sum(LENGTHS))
    dirty = clean.clone()
    dirty[:, 0] = (dirty[:, 0] + 1) % 40
    assert ((model(clean) - model(dirty))[:, 1:].abs().amax((0, 2)) > 1e-9).all()


@pytest.mark.fast
def test_padding_is_left_out() -> None:
    """Of the loss, of the routers' statistics, and of the experts; gradients too."""
    model = make_model(moe=MoEConfig(capacity_factor=1.1))
    ids = tokens_of(50)
    short = losses_of(model, ids, cu_seqlens=bounds([20, 30]))
    (short.loss_sum + short.aux_loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    padded = torch.cat([ids, torch.full((1, 30), 3)], dim=1)
    labels = torch.cat([ids[:, 1:], torch.full((1, 31), -100)], dim=1)
    seen: list[int] = []
    for layer in model.layers:
        layer.block_sparse_moe.experts.register_forward_pre_hook(
            lambda module, args: seen.append(int((args[1] < SMALL.num_experts).sum()))
        )
    long = model(padded, labels=labels, cu_seqlens=bounds([20, 30, 30]), num_tokens=50)
    torch.testing.assert_close(long.loss_sum, short.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(long.aux_loss, short.aux_loss, rtol=1e-12, atol=0)
    assert torch.equal(long.counts, short.counts)
    assert long.counts.sum(1).tolist() == [100] * 4
    assert torch.equal(long.num_dropped, short.num_dropped)
    assert sum(seen) == 400 - int(long.num_dropped)
    (long.loss_sum + long.aux_loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-10, msg=name)


# Routers and experts.


def test_aux_loss_against_a_loop() -> None:
    moe = make_model().layers[0].block_sparse_moe
    x = torch.randn(2, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, stats = moe(x)
    chosen, probability = [0] * 4, [0.0] * 4
    for token in x.flatten(0, 1):
        logits = [
            sum(a * b for a, b in zip(w, token.tolist(), strict=True))
            for w in moe.gate.weight.tolist()
        ]
        total = sum(math.exp(z) for z in logits)
        for expert in range(4):
            probability[expert] += math.exp(logits[expert]) / total
        for expert in sorted(range(4), key=lambda e: -logits[e])[:2]:
            chosen[expert] += 1
    aux = 4 * sum(c / 120 * p / 60 for c, p in zip(chosen, probability, strict=True))
    assert stats.aux_loss.item() == pytest.approx(aux, rel=1e-12)
    assert stats.counts.tolist() == chosen
    assert stats.num_dropped == 0


@pytest.mark.fast
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (4, 2), (32, 2)])
def test_aux_loss_is_one_at_balance(num_experts: int, k: int) -> None:
    config = replace(SMALL, num_experts=num_experts, num_experts_per_token=k)
    moe = MoE(config, MoEConfig())
    moe.gate.weight.data.zero_()
    moe.experts.requires_grad_(False)
    for parameter in moe.experts.parameters():
        parameter.zero_()
    _, stats = moe(torch.randn(1, 8, 16))
    # All probabilities equal: whatever is chosen, sum f = 1 and m = 1/E.
    assert stats.aux_loss.item() == pytest.approx(1.0, rel=1e-6)


def slow_moe(moe: MoE, x: Tensor, capacity: int | None) -> tuple[Tensor, int]:
    """Token by token: choices, weights, seats, experts. Returns the output and what was dropped."""
    logits = x @ moe.gate.weight.t()
    k = moe.num_experts_per_token
    choices = [sorted(range(moe.num_experts), key=lambda e: -row[e])[:k] for row in logits.tolist()]
    seats = [math.inf if capacity is None else capacity] * moe.num_experts
    rows = [torch.zeros(x.shape[1], dtype=x.dtype) for _ in choices]
    dropped = 0
    for rank in range(k):
        for token, chosen in enumerate(choices):
            expert = chosen[rank]
            if seats[expert] == 0:
                dropped += 1
                continue
            seats[expert] -= 1
            w1, w3, w2 = (w[expert] for w in (moe.experts.w1, moe.experts.w3, moe.experts.w2))
            inner = torch.nn.functional.silu(w1 @ x[token]) * (w3 @ x[token])
            rows[token] = rows[token] + logits[token, chosen].softmax(0)[rank] * (w2 @ inner)
    return torch.stack(rows), dropped


@pytest.mark.fast
@pytest.mark.parametrize("factor", [None, 0.3, 1.0, 1.1, 4.0])
def test_experts_and_capacity_against_a_loop(factor: float | None) -> None:
    moe = make_model(moe=MoEConfig(capacity_factor=factor)).layers[0].block_sparse_moe
    x = torch.randn(2, 15, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    capacity = None if factor is None else math.ceil(factor * 30 * 2 / 4)
    output, stats = moe(x)
    want, dropped = slow_moe(moe, x.flatten(0, 1), capacity)
    torch.testing.assert_close(output.flatten(0, 1), want, rtol=0, atol=1e-12)
    assert stats.num_dropped == dropped
    assert (dropped > 0) == (factor is not None and factor <= 1.1)
    assert stats.counts.sum() == 60
    mine = torch.autograd.grad(output.square().sum(), list(moe.parameters()))
    theirs = torch.autograd.grad(want.square().sum(), list(moe.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


# Decoding.


@pytest.mark.fast
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 11], [19, 1], [20]])
def test_decoding_with_a_cache_equals_one_shot(chunks: list[int]) -> None:
    model = make_model()
    ids = torch.cat([tokens_of(20), tokens_of(20, seed=5)])
    with torch.no_grad():
        whole = model(ids)
        cache = Cache()
        parts = [model(part, cache=cache) for part in ids.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    assert cache.num_tokens == 20
    assert sorted(cache.states) == [0, 2]
    assert sorted(cache.keys_values) == [1, 3]


# The full model, on the meta device.


@pytest.fixture(scope="module")
def text01() -> TextModel:
    with torch.device("meta"):
        return TextModel(TEXT01, MoEConfig())


def test_text01_counts(text01: TextModel) -> None:
    assert count_parameters(text01) == 456_089_655_296
    assert count_active_parameters(text01) == 45_944_920_064
    assert TEXT01.alpha == 3.5565588200778455
    assert TEXT01.num_softmax_layers == 10


def test_text01_has_the_released_keys(text01: TextModel) -> None:
    """Written out here from the release's key list, not taken from the mapping."""
    want: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (200_064, 6144),
        "model.norm.weight": (6144,),
        "lm_head.weight": (200_064, 6144),
    }
    softmax = {"q_proj": (8192, 6144), "k_proj": (1024, 6144), "v_proj": (1024, 6144)}
    softmax["o_proj"] = (6144, 8192)
    lightning: dict[str, tuple[int, ...]] = {"qkv_proj": (24_576, 6144), "norm": (8192,)}
    lightning |= {"output_gate": (8192, 6144), "out_proj": (6144, 8192)}
    for i in range(80):
        layer = f"model.layers.{i}"
        want[f"{layer}.input_layernorm.weight"] = (6144,)
        want[f"{layer}.post_attention_layernorm.weight"] = (6144,)
        want[f"{layer}.block_sparse_moe.gate.weight"] = (32, 6144)
        for e in range(32):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            want[f"{expert}.w1.weight"] = want[f"{expert}.w3.weight"] = (9216, 6144)
            want[f"{expert}.w2.weight"] = (6144, 9216)
        for name, shape in (softmax if i % 8 == 7 else lightning).items():
            want[f"{layer}.self_attn.{name}.weight"] = shape
    layout = released_layout(TEXT01)
    assert len(want) == len(layout) == 8243
    assert {key: slot.shape for key, slot in layout.items()} == want
    assert {slot.name for slot in layout.values()} == {
        name for name, _ in text01.named_parameters()
    }


@pytest.mark.fast
def test_slopes_made_for_inference_serve_training() -> None:
    with torch.inference_mode():
        slopes = decay_slopes(2, 5, 7, torch.device("cpu"))
    assert not slopes.is_inference()


@pytest.mark.fast
def test_decay_slopes_are_the_released_ones() -> None:
    """Figures from reference/minimax01.md, 1.4: reach 1 / slope of the fastest and slowest head."""
    cpu = torch.device("cpu")
    first = decay_slopes(64, 0, 80, cpu)
    assert first.dtype == torch.float32
    assert first[0].item() == pytest.approx(0.91700 * (1 + 1e-5), rel=1e-5)
    assert first[-1].item() == pytest.approx(2**-8 * (1 + 1e-5), rel=1e-6)
    for layer, fastest, slowest in [
        (38, 2.1, 493),
        (70, 9.6, 2247),
        (77, 43, 10_108),
        (78, 86, 20_208),
    ]:
        reach = 1 / decay_slopes(64, layer, 80, cpu)
        assert reach[0].item() == pytest.approx(fastest, rel=0.03)
        assert reach[-1].item() == pytest.approx(slowest, rel=1e-3)


# Initial weights.

INIT = replace(SMALL, num_layers=3, softmax_every=3, hidden_size=64, head_dim=32, vocab_size=512)
INIT = replace(INIT, num_attention_heads=4, num_key_value_heads=2, expert_hidden_size=96)


def test_initial_standard_deviations() -> None:
    model = TextModel(INIT, MoEConfig())
    init_model(model, INIT, 0)
    beta = (8 * 3) ** -0.25
    inner, kv = 4 * 32, 2 * 32
    want = {
        "embed_tokens.weight": math.sqrt(2 / (512 + 64)),
        "lm_head.weight": math.sqrt(2 / (512 + 64)),
        "layers.0.self_attn.output_gate.weight": math.sqrt(2 / (64 + inner)),
        "layers.0.self_attn.out_proj.weight": beta * math.sqrt(2 / (64 + inner)),
        "layers.2.self_attn.q_proj.weight": math.sqrt(2 / (64 + inner)),
        "layers.2.self_attn.k_proj.weight": math.sqrt(2 / (64 + kv)),
        "layers.2.self_attn.v_proj.weight": beta * math.sqrt(2 / (64 + kv)),
        "layers.2.self_attn.o_proj.weight": beta * math.sqrt(2 / (64 + inner)),
        "layers.0.block_sparse_moe.gate.weight": math.sqrt(2 / (64 + 4)),
        "layers.1.block_sparse_moe.experts.w1": beta * math.sqrt(2 / (64 + 96)),
        "layers.1.block_sparse_moe.experts.w2": beta * math.sqrt(2 / (64 + 96)),
        "layers.1.block_sparse_moe.experts.w3": beta * math.sqrt(2 / (64 + 96)),
    }
    measured = {name: model.get_parameter(name) for name in want}
    qkv = model.get_parameter("layers.0.self_attn.qkv_proj.weight").view(4, 3, 32, 64)
    for part, gain in enumerate((1.0, 1.0, beta)):
        name = f"part {part} of qkv_proj"
        measured[name], want[name] = qkv[:, part], gain * math.sqrt(2 / (64 + inner))
    for name, values in measured.items():
        # Five standard errors of a standard deviation from n draws.
        tolerance = 5 / math.sqrt(2 * values.numel())
        assert values.std().item() == pytest.approx(want[name], rel=tolerance), name
        assert abs(values.mean().item()) <= 5 * want[name] / math.sqrt(values.numel()), name
    for name, parameter in model.named_parameters():
        assert (parameter.dim() == 1) == (init_std(name, parameter.shape, INIT) is None)
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.self_attn.qkv_proj.weight", (384, 64)),
        ("layers.1.block_sparse_moe.experts.w2", (5, 64, 96)),
        ("embed_tokens.weight", (BLOCK_ELEMENTS // 64 + 100, 64)),  # crosses a block of draws
    ],
)
def test_initial_values_do_not_depend_on_the_sharding(name: str, shape: tuple[int, ...]) -> None:
    num_rows = math.prod(shape[:-1])

    def rows(first: int, end: int, seed: int = 3) -> Tensor:
        local = torch.full((end - first, shape[-1]), math.nan)
        size = torch.Size(shape)
        init_rows(local, name, size, config=INIT, seed=seed, first_row=first)
        return local

    whole = rows(0, num_rows)
    cut = num_rows // 3
    parts = [rows(0, cut), rows(cut, cut), rows(cut, cut + 1), rows(cut + 1, num_rows)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(rows(num_rows - 1, num_rows), whole[-1:])
    assert not torch.equal(rows(0, num_rows, seed=4), whole)
    assert whole.unique().numel() > 0.98 * whole.numel()


@pytest.mark.fast
def test_parameters_have_draws_of_their_own() -> None:
    model = TextModel(INIT, MoEConfig())
    init_model(model, INIT, 0)
    first, second = (model.layers[i].block_sparse_moe for i in (0, 1))
    assert not torch.equal(first.experts.w1, second.experts.w1)
    assert not torch.equal(first.experts.w1, first.experts.w3)
    assert not torch.equal(first.experts.w1[0], first.experts.w1[1])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"num_attention_heads": 6, "num_key_value_heads": 1}, "power of two"),
        ({"num_key_value_heads": 3}, "not a multiple of model.num_key_value_heads=3"),
        ({"rotary_dim": 10}, "model.rotary_dim=10"),
        ({"rotary_dim": 3}, "model.rotary_dim=3"),
        ({"num_experts_per_token": 5}, "exceeds model.num_experts=4"),
        ({"softmax_every": -1}, "model.softmax_every=-1"),
    ],
)
def test_impossible_shapes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(replace(SMALL, **change), MoEConfig())


@pytest.mark.fast
def test_impossible_capacity_is_named() -> None:
    with pytest.raises(ValueError, match=r"moe.capacity_factor=0"):
        check_model(SMALL, MoEConfig(capacity_factor=0.0))


def test_evaluation_drops_nothing() -> None:
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rotary_dim=4,
        num_experts=4,
        num_experts_per_token=2,
        expert_hidden_size=8,
        vocab_size=32,
        softmax_every=2,
    )
    model = TextModel(config, MoEConfig(capacity_factor=0.5))
    init_model(model, config, 0)
    ids = torch.randint(32, (1, 40))
    assert model(ids, labels=ids).num_dropped > 0
    model.eval()
    assert model(ids, labels=ids).num_dropped == 0
