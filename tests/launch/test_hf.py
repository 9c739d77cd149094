"""Export and import: what is written, what is checked, what is refused."""

import io
import itertools
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fulmen.data.shards import FORMAT_VERSION
from fulmen.launch import export_hf, import_hf
from fulmen.launch.export_hf import INDEX, ExportConfig, export, plan_shards
from fulmen.launch.import_hf import ImportConfig, import_released
from fulmen.models.config import ModelConfig
from fulmen.models.hf import (
    FORMATS,
    Slot,
    parameter_shapes,
    released_layout,
)
from fulmen.trainer import weights as weights_module
from fulmen.trainer.manifest import CheckpointError, verify
from fulmen.trainer.weights import CheckpointWeights, Piece, load_model_config, save_weights

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=3,
    num_experts_per_token=2,
    expert_hidden_size=12,
    vocab_size=40,
    softmax_every=2,
)
QUIET = Console(quiet=True)
SHARD_GIB = 9000 / 2**30


def random_weights(model: ModelConfig = MODEL) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(model)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def whole_pieces() -> list[Piece]:
    """Every parameter in one piece."""
    return [
        Piece(name, tuple(t.shape), (0, t.shape[0]), lambda t=t: t)
        for name, t in random_weights().items()
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with stacked experts in one piece, as a run writes it, and its exports."""
    root = tmp_path_factory.mktemp("hf")
    save_weights(
        root / "checkpoint", whole_pieces(), {"model": asdict(MODEL), "data": {"seq_len": 64}}
    )
    for format in FORMATS:
        run_export(root / "checkpoint", root / format, format=format)
    return root


@pytest.fixture
def released(written: Path, tmp_path: Path) -> Path:
    """An export that a test may damage."""
    return Path(shutil.copytree(written / "released", tmp_path / "released"))


def run_export(checkpoint: Path, output: Path, **changes: Any) -> None:
    settings = ExportConfig(str(checkpoint), str(output), dtype="float32", max_shard_gib=SHARD_GIB)
    export(replace(settings, **changes), QUIET)


def run_import(folder: Path, output: Path) -> None:
    import_released(ImportConfig(str(folder), str(output)), QUIET)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_shard(folder: Path, key: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Rewrite the file that holds `key`."""
    name = json.loads((folder / INDEX).read_text())["weight_map"][key]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    return folder / name


GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.1.w2.weight"


# What is written.


@pytest.mark.fast
def test_files_index_and_sizes(written: Path) -> None:
    index = json.loads((written / "released" / INDEX).read_text())
    files = sorted(path.name for path in (written / "released").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    layout = released_layout(MODEL)
    assert set(index["weight_map"]) == set(layout)
    total = 0
    for name in files:
        tensors = load_file(written / "released" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 9000 or len(tensors) == 1
        total += size
        with safe_open(written / "released" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


@pytest.mark.fast
def test_values_of_named_tensors(written: Path) -> None:
    """Spelled out for one key of each kind; the round trips below cover the rest."""
    ours = random_weights()
    tensors: dict[str, Tensor] = {}
    for path in (written / "released").glob("*.safetensors"):
        tensors |= load_file(path)
    assert torch.equal(tensors["lm_head.weight"], ours["lm_head.weight"])
    assert torch.equal(tensors["model.embed_tokens.weight"], ours["embed_tokens.weight"])
    assert torch.equal(tensors[GATE], ours["layers.1.block_sparse_moe.gate.weight"])
    for matrix in ("w1", "w2", "w3"):
        stacked = ours[f"layers.2.block_sparse_moe.experts.{matrix}"]
        for e in range(3):
            key = f"model.layers.2.block_sparse_moe.experts.{e}.{matrix}.weight"
            assert torch.equal(tensors[key], stacked[e])


@pytest.mark.fast
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(written: Path, tmp_path: Path, format: str) -> None:
    run_import(written / format, tmp_path / "imported")
    verify(tmp_path / "imported")
    assert load_model_config(tmp_path / "imported") == MODEL
    weights = CheckpointWeights(tmp_path / "imported")
    assert weights.shapes == parameter_shapes(MODEL)
    for name, tensor in random_weights().items():
        assert torch.equal(weights.read(name), tensor), name
    run_export(tmp_path / "imported", tmp_path / "again", format=format)
    for path in (written / format).iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_trainers_loader_reads_an_import(written: Path, tmp_path: Path) -> None:
    """DCP's own load, into whole tensors by the trainer's names."""
    run_import(written / "released", tmp_path / "imported")
    ours = random_weights()
    loaded = {f"model.{name}": torch.full_like(t, float("nan")) for name, t in ours.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "imported", no_dist=True)
    for name, tensor in ours.items():
        assert torch.equal(loaded[f"model.{name}"], tensor), name


@pytest.mark.fast
def test_bfloat16_is_the_rounded_weight(written: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    settings = ExportConfig(str(written / "checkpoint"), str(tmp_path / "low"))
    export(settings, console)
    assert "were rounded to bfloat16" in console.export_text()
    tensors = load_file(tmp_path / "low" / "model-00001-of-00001.safetensors")
    ours = random_weights()["layers.2.block_sparse_moe.experts.w2"][1]
    assert torch.equal(tensors[EXPERT], ours.bfloat16())
    run_import(tmp_path / "low", tmp_path / "imported")
    got = CheckpointWeights(tmp_path / "imported").read("layers.2.block_sparse_moe.experts.w2")
    assert torch.equal(got[1], ours.bfloat16().float())


@pytest.mark.fast
def test_a_partial_rope_export_for_transformers_warns(written: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    settings = ExportConfig(str(written / "checkpoint"), str(tmp_path / "x"), "transformers")
    export(settings, console)
    assert "warning: model.rotary_dim=4 of head_dim=8" in console.export_text()


@pytest.mark.fast
def test_the_runs_tokenizer_is_copied(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "tokenizer.json").write_text("{}")
    end = {"token": "<end>", "id": 3}
    manifest = {"format_version": FORMAT_VERSION, "end_of_document": end}
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(manifest))
    sources = {"books": {"path": str(tmp_path / "prepared"), "weight": 1.0}}
    data = {"seq_len": 64, "sources": sources}
    save_weights(checkpoint, whole_pieces(), {"model": asdict(MODEL), "data": data})
    run_export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    # So that transformers, and what is built on it, knows where a text ends.
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 3}


@pytest.mark.fast
def test_shards_are_planned_by_size() -> None:
    layout = {
        name: Slot(name, None, (size,)) for name, size in zip("abcde", [3, 3, 9, 1, 4], strict=True)
    }
    assert plan_shards(layout, 2, 12) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(layout, 2, 1e9) == [["a", "b", "c", "d", "e"]]
    assert plan_shards(layout, 2, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]


# Memory.


@pytest.mark.fast
def test_exporting_holds_one_file_at_a_time(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file is made from owns its memory: no view keeps a stacked parameter alive."""
    held: list[int] = []

    def watched(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(export_hf, "save_file", watched)
    run_export(written / "checkpoint", tmp_path / "out")
    assert len(held) > 3
    assert max(held) <= 9000


@pytest.mark.fast
def test_saving_holds_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are fetched in order, as they are written, and let go with their file."""
    monkeypatch.setattr(weights_module, "FILE_BYTES", 20_000)
    tensors = random_weights()
    fetched: list[weakref.ref[Any]] = []
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        alive = [array for reference in fetched if (array := reference()) is not None]
        most = max(most, sum(array.nbytes for array in alive))
        memory = tensors[name].numpy().copy()  # kept alive by any tensor that shares it
        fetched.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    names: list[str] = []
    pieces = [
        Piece(name, tuple(t.shape), (0, t.shape[0]), lambda name=name: fetch(name))
        for name, t in tensors.items()
    ]
    save_weights(
        tmp_path / "out",
        pieces,
        {"model": asdict(MODEL)},
        on_fetch=lambda piece: names.append(piece.name),
    )
    assert names == list(tensors)
    assert 0 < most <= 20_000
    assert sum(tensor.nbytes for tensor in tensors.values()) > 3 * most
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 3
    verify(tmp_path / "out")


@pytest.mark.fast
def test_rows_are_read_without_the_rest(written: Path, tmp_path: Path) -> None:
    run_import(written / "released", tmp_path / "imported")
    name = "layers.0.block_sparse_moe.experts.w1"
    stacked = random_weights()[name]
    one, whole = CheckpointWeights(tmp_path / "imported"), CheckpointWeights(written / "checkpoint")
    assert one.row_groups(name) == [(0, 1), (1, 2), (2, 3)]
    assert whole.row_groups(name) == [(0, 3)]
    for weights in (one, whole):
        got = weights.read(name, rows=(1, 3), dtype=torch.bfloat16)
        assert torch.equal(got, stacked[1:3].bfloat16())


@pytest.mark.fast
def test_stored_pieces_of_any_cut_are_read(tmp_path: Path) -> None:
    """Experts spread unevenly over ranks, as expert parallelism stores them."""
    tensors = random_weights()
    pieces = []
    for name, t in tensors.items():
        cuts = [0, 2, 3] if ".experts." in name else [0, t.shape[0]]
        for first, end in itertools.pairwise(cuts):
            pieces.append(
                Piece(name, tuple(t.shape), (first, end), lambda t=t, a=first, b=end: t[a:b])
            )
    config = {"model": asdict(MODEL), "data": {"seq_len": 64}}
    save_weights(tmp_path / "checkpoint", pieces, config)
    weights = CheckpointWeights(tmp_path / "checkpoint")
    assert weights.row_groups("layers.0.block_sparse_moe.experts.w3") == [(0, 2), (2, 3)]
    run_export(tmp_path / "checkpoint", tmp_path / "out")
    run_import(tmp_path / "out", tmp_path / "imported")
    for name, tensor in tensors.items():
        assert torch.equal(CheckpointWeights(tmp_path / "imported").read(name), tensor), name


# What is refused.


@pytest.fixture
def refused(released: Path, tmp_path: Path) -> Callable[[str], None]:
    """Importing the damaged folder raises this message and leaves nothing behind."""

    def check(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            run_import(released, tmp_path / "imported")
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ["released"]

    return check


@pytest.mark.fast
def test_missing_keys_are_named(released: Path, refused: Callable[[str], None]) -> None:
    change_shard(released, GATE, lambda tensors: tensors.pop(GATE))
    change_shard(released, EXPERT, lambda tensors: tensors.pop(EXPERT))
    refused(rf"2 missing: {GATE}, {EXPERT}")


@pytest.mark.fast
def test_unexpected_keys_are_named(released: Path, refused: Callable[[str], None]) -> None:
    extra = {f"model.layers.9.bias.{n}": torch.zeros(1) for n in range(7)}
    change_shard(released, GATE, lambda tensors: tensors.update(extra))
    refused(r"7 unexpected: model.layers.9.bias.0, .*bias.4, and 2 more$")


@pytest.mark.fast
def test_wrong_shapes_are_named(released: Path, refused: Callable[[str], None]) -> None:
    change_shard(released, GATE, lambda tensors: tensors.update({GATE: torch.zeros(4, 16)}))
    refused(rf"1 of another shape: {GATE} \[4, 16\] instead of \[3, 16\]")


@pytest.mark.fast
def test_all_kinds_of_faults_are_in_one_message(
    released: Path, refused: Callable[[str], None]
) -> None:
    change_config(released, num_local_experts=2, vocab_size=41)
    refused(r"12\d* unexpected: .*; 6 of another shape: .*embed_tokens.weight \[40, 16\] instead")


@pytest.mark.fast
@pytest.mark.parametrize("keep", [0.6, 0.001])
def test_a_truncated_shard_is_named(
    released: Path, refused: Callable[[str], None], keep: float
) -> None:
    shard = released / json.loads((released / INDEX).read_text())["weight_map"][EXPERT]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep)])
    refused(rf"{shard.name} is truncated or not a safetensors file")


@pytest.mark.fast
def test_a_lost_shard_is_named(released: Path, refused: Callable[[str], None]) -> None:
    shard = released / json.loads((released / INDEX).read_text())["weight_map"][EXPERT]
    shard.unlink()
    refused(f"{shard.name} is missing")


@pytest.mark.fast
def test_an_index_that_disagrees_is_refused(released: Path, refused: Callable[[str], None]) -> None:
    index = json.loads((released / INDEX).read_text())
    index["weight_map"][GATE] = index["weight_map"]["lm_head.weight"]
    (released / INDEX).write_text(json.dumps(index))
    refused(rf"{INDEX} names the wrong file for 1 keys: {GATE}")
    for weight_map in (index["weight_map"] | {GATE: 1}, [GATE]):
        (released / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(rf"{INDEX} cannot be read: weight_map must give each key the name of a file")


@pytest.mark.fast
def test_quantised_weights_are_refused(released: Path, refused: Callable[[str], None]) -> None:
    low = torch.zeros(3, 16, dtype=torch.float8_e4m3fn)
    change_shard(released, GATE, lambda tensors: tensors.update({GATE: low}))
    refused(rf"1 tensors are none of F32, BF16, F16: {GATE} \(F8_E4M3\)")


@pytest.mark.fast
def test_files_that_are_not_there(released: Path, refused: Callable[[str], None]) -> None:
    (released / INDEX).unlink()
    refused(f"holds neither {INDEX} nor model.safetensors")
    (released / "config.json").write_text("{")
    refused("config.json is not JSON")
    (released / "config.json").unlink()
    refused("config.json cannot be read: No such file")


@pytest.mark.fast
def test_one_file_without_an_index(released: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for path in released.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (released / INDEX).unlink()
    save_file(tensors, released / "model.safetensors")
    run_import(released, tmp_path / "imported")
    weights = CheckpointWeights(tmp_path / "imported")
    assert all(torch.equal(weights.read(n), t) for n, t in random_weights().items())


@pytest.mark.fast
def test_decay_buffers_are_ignored_where_they_belong(
    released: Path, tmp_path: Path, refused: Callable[[str], None]
) -> None:
    lightning = "model.layers.0.self_attn.slope_rate"
    softmax = "model.layers.1.self_attn.slope_rate"
    change_shard(released, GATE, lambda tensors: tensors.update({softmax: torch.zeros(4)}))
    refused(f"1 unexpected: {softmax}")
    change_shard(released, GATE, lambda tensors: tensors.pop(softmax))
    change_shard(released, GATE, lambda tensors: tensors.update({lightning: torch.zeros(4)}))
    run_import(released, tmp_path / "imported")


@pytest.mark.fast
def test_nothing_is_overwritten(written: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("dear")
    with pytest.raises(ValueError, match="mine exists already: nothing is overwritten"):
        run_export(written / "checkpoint", tmp_path / "mine")
    with pytest.raises(ValueError, match="mine exists already: nothing is overwritten"):
        run_import(written / "released", tmp_path / "mine")
    (tmp_path / "new.tmp").mkdir()
    with pytest.raises(ValueError, match=r"new.tmp is left from an interrupted run: remove it"):
        run_export(written / "checkpoint", tmp_path / "new")
    assert (tmp_path / "mine" / "file").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new.tmp"]


@pytest.mark.fast
def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise ValueError("the file went away")

    shape = (4, 2)
    pieces = [
        Piece("embed_tokens.weight", shape, (0, 2), lambda: torch.zeros(2, 2)),
        Piece("embed_tokens.weight", shape, (2, 4), fail),
    ]
    with pytest.raises(ValueError, match="the file went away"):
        save_weights(tmp_path / "out", pieces, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_a_damaged_checkpoint_is_refused(written: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(written / "checkpoint", tmp_path / "checkpoint"))
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is corrupt"):
        run_export(checkpoint, tmp_path / "out")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        run_export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.fast
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    other = asdict(replace(MODEL, num_layers=5, vocab_size=41))
    save_weights(tmp_path / "checkpoint", whole_pieces(), {"model": other, "data": {"seq_len": 64}})
    with pytest.raises(ValueError, match=r"10 missing: .*and 5 more; 2 of another shape: embed"):
        run_export(tmp_path / "checkpoint", tmp_path / "out")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "gguf"}, "format=gguf: must be one of released, transformers"),
        ({"dtype": "int8"}, "dtype=int8: must be one of bfloat16, float32"),
        ({"max_shard_gib": 0.0}, "max_shard_gib=0.0: must be positive"),
    ],
)
def test_bad_keys_of_the_command(
    written: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_export(written / "checkpoint", tmp_path / "out", **changes)


# config.json.


@pytest.mark.fast
@pytest.mark.parametrize("format", FORMATS)
def test_a_config_that_fulmen_cannot_follow_is_refused(
    released: Path, refused: Callable[[str], None], written: Path, format: str
) -> None:
    """What is refused is in tests/models/test_hf_config.py; here, that it reaches the command."""
    shutil.copyfile(written / format / "config.json", released / "config.json")
    change_config(released, tie_word_embeddings=True)
    refused(r"released.config\.json: tie_word_embeddings=True")


# The commands.


def command(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.fast
def test_commands(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with relative paths; Hydra leaves nothing there."""
    monkeypatch.chdir(tmp_path)
    source = f"checkpoint={written / 'checkpoint'}"
    command(export_hf, monkeypatch, source, "output=out", "dtype=float32", "format=transformers")
    command(import_hf, monkeypatch, "input=out", "output=deep/back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "out"]
    for name, tensor in random_weights().items():
        assert torch.equal(CheckpointWeights(tmp_path / "deep/back").read(name), tensor)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (export_hf, ["checkpoint=x"], "no value for output"),
        (export_hf, ["checkpoint=x", "output=y"], "x is not a whole checkpoint"),
        (export_hf, ["fromat=released"], "unknown key fromat; did you mean format?"),
        (export_hf, ["max_shard_gib=many"], "max_shard_gib"),
        (import_hf, ["input=x", "output=y"], "config.json cannot be read"),
        (import_hf, ["imput=x"], "unknown key imput; did you mean input"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        command(module, monkeypatch, *arguments)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []
