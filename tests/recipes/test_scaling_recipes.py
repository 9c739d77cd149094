"""The scaling experiments: every size of every kind is valid, and as large as the paper's."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
import yaml
from support.tiny import ROOT, compose_config

from fulmen.models.config import MoEConfig
from fulmen.models.moe import MoE
from fulmen.models.text import TextModel, count_active_parameters, count_parameters
from fulmen.trainer.config import RunConfig, check_config
from fulmen.trainer.flops import forward_flops
from fulmen.trainer.memory import count_model
from fulmen.trainer.scaling import PAPER, kind_of, paper_flops_per_token, paper_parameters
from fulmen.trainer.schedule import total_tokens

pytestmark = pytest.mark.fast

SIZES = {"70m": 70e6, "160m": 160e6, "410m": 410e6, "1b": 1e9, "3b": 3e9, "7b": 7e9}
NANO = {"nano1": 8, "nano2": 16, "nano3": 32, "nano4": 64}
KINDS = {"softmax": 1, "lightning": 0, "hybrid": 8}


def composed(size: str, kind: str, *overrides: str) -> RunConfig:
    words = ["recipe=scaling", f"scaling/size={size}", f"scaling/kind={kind}", *overrides]
    if size in SIZES:
        words.append("data.sources.corpus.path=somewhere")
    return compose_config(words)


def test_no_size_and_no_kind_is_left_out() -> None:
    for group, names in [("size", {*SIZES, *NANO}), ("kind", set(KINDS))]:
        files = {path.stem for path in (ROOT / "recipes" / "scaling" / group).glob("*.yaml")}
        assert files == names
    assert set(PAPER) == set(KINDS)


@pytest.mark.parametrize(("size", "kind"), list(product([*SIZES, *NANO], KINDS)))
def test_every_combination(size: str, kind: str) -> None:
    config = composed(size, kind)
    for world_size in (1, 8, 64) if size in SIZES else (1,):
        check_config(config, world_size)
    assert kind_of(config.model) == kind
    assert config.model.softmax_every == KINDS[kind]
    assert config.model.num_layers % 8 == 0  # so that a hybrid has exactly one in eight
    # Fixed learning rate, for all sizes of a ladder.
    assert {phase.lr_factor for phase in config.schedule.phases} == {1.0}
    assert config.optim.weight_decay == 0.1
    assert config.model.hidden_size == NANO.get(size, config.model.hidden_size)
    if size in SIZES:
        assert (config.optim.lr, config.data.seq_len) == (3e-4, 8192)
        assert config.data.global_batch_tokens == 4 * 2**20
        assert total_tokens(config) == 300_000_000_000


@pytest.mark.parametrize(("size", "kind"), list(product(SIZES, KINDS)))
def test_sizes_are_the_papers(size: str, kind: str) -> None:
    model = composed(size, kind).model
    counted = count_model(model).active
    # Softmax layers: 12 d^2 as in table 1, SwiGLU of inner width f with 3 d f for the MLP's 8 d^2
    # where the heads are as wide as the residual stream.
    layers, width, inner = model.num_layers, model.hidden_size, model.num_attention_heads
    inner *= model.head_dim
    norms, router = 2 * width, width
    lightning = layers - model.num_softmax_layers
    # A lightning layer has a fifth matrix, the output gate, where the paper counts 2 d^2 / h.
    gates = lightning * (width * inner + inner)
    sheet = layers * (4 * width * inner + 3 * width * model.expert_hidden_size + norms + router)
    assert counted == sheet + gates + width
    assert counted == pytest.approx(SIZES[size], rel=0.07)
    if kind == "softmax":
        assert counted == pytest.approx(paper_parameters(model), rel=0.01)
    else:
        assert 1.04 < counted / paper_parameters(model) < 1.10
    without = counted - gates + lightning * 2 * width**2 / model.num_attention_heads
    assert without == pytest.approx(paper_parameters(model), rel=0.01)


@pytest.mark.parametrize(("size", "kind"), list(product(SIZES, KINDS)))
def test_operations_beside_the_papers(size: str, kind: str) -> None:
    """The same matrices; the cores differ in that our heads are not as wide as the stream."""
    config = composed(size, kind)
    model, length = config.model, config.data.seq_len
    ours = forward_flops(
        model,
        num_tokens=1,
        sum_squared_lengths=2 * length,  # in full, as the paper counts
        num_assignments=model.num_layers,
    )
    layers, width, heads = model.num_layers, model.hidden_size, model.num_attention_heads
    softmax = model.num_softmax_layers
    inner = heads * model.head_dim
    gates = 2 * (layers - softmax) * width * inner
    matrices = 3 * (sum(ours.values()) - ours["head"] - gates)
    matrices -= 3 * (ours["softmax_core"] + ours["lightning_core"])
    assert matrices == pytest.approx(72 * layers * width**2, rel=0.01)
    # 72 l d^2 (s n / 6d) and 72 l d^2 (1 - s) / 2h, gate included.
    assert 3 * ours["softmax_core"] == pytest.approx(12 * softmax * width * length * inner / width)
    core = 3 * ours["lightning_core"]
    assert core == pytest.approx(12 * (layers - softmax) * inner**2 / heads)
    rest = 72 * layers * width**2 + 12 * softmax * width * length
    rest += 36 * (layers - softmax) * width**2 / heads + 20 * layers * width
    assert paper_flops_per_token(model, length) == pytest.approx(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_what_is_counted(kind: str) -> None:
    config = composed("nano2", kind)
    with torch.device("meta"):
        model = TextModel(config.model, config.moe)
    count = count_model(config.model)
    assert (count.total, count.active) == (count_parameters(model), count_active_parameters(model))
    assert count.total == count.active + 2 * 4096 * NANO["nano2"]


@pytest.mark.parametrize(
    "name", [*(f"size/{s}" for s in (*SIZES, *NANO)), *(f"kind/{k}" for k in KINDS)]
)
def test_a_file_holds_values_only(name: str) -> None:
    text = (ROOT / "recipes" / "scaling" / f"{name}.yaml").read_text()
    assert "${" not in text
    assert "_target_" not in text
    assert isinstance(yaml.safe_load(text), dict)


def test_one_expert_is_a_dense_layer() -> None:
    """Equal to SwiGLU without a router, forward and backward; the router learns nothing."""
    config = composed("nano1", "hybrid")
    torch.manual_seed(0)
    layer = MoE(config.model, MoEConfig(aux_loss_coef=0.0)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    output, stats = layer(x, num_tokens=None)
    w1, w3, w2 = (w[0] for w in (layer.experts.w1, layer.experts.w3, layer.experts.w2))
    dense = (F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(dense)
    leaves = [x, *layer.experts.parameters()]
    got = torch.autograd.grad(
        (output * weight).sum() + stats.aux_loss, [*leaves, layer.gate.weight]
    )
    expected = torch.autograd.grad((dense * weight).sum(), leaves)
    for one, other in zip(got, expected, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert got[-1].abs().max() < 1e-12
    assert stats.aux_loss.item() == pytest.approx(1.0)
    assert stats.num_dropped.item() == 0
