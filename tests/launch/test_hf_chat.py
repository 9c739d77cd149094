"""transformers renders the turns of an exported model as they were prepared."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.tiny import tiny_model
from transformers import AutoTokenizer

from fulmen.data.conversations import parse_example
from fulmen.data.image_encoding import HEADERS, SpecialIds, tokenise_example
from fulmen.data.shards import FORMAT_VERSION
from fulmen.data.tokenise import train_tokenizer
from fulmen.launch import export_hf
from fulmen.launch.export_hf import ExportConfig, export
from fulmen.models.hf import parameter_shapes
from fulmen.models.image_layout import Tiling, image_layout
from fulmen.trainer.weights import Piece, save_weights

NAMES = {"image_token": "<image>", "begin_turn": '<"bégin" 🙂>', "end_turn": "<end>"}
IDS = SpecialIds(end_of_document=0, image=1, begin_turn=2, end_turn=3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of conversations, whose first source is plain text of the same tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_tokenizer(
        iter([*HEADERS.values(), "which word is this? it is hello"] * 2),
        vocab_size=300,
        end_of_document="<eod>",
        special_tokens=list(NAMES.values()),
    )
    plain = {"format_version": FORMAT_VERSION, "end_of_document": {"token": "<eod>", "id": 0}}
    turns = plain | {"settings": NAMES, "special_ids": asdict(IDS)}
    for name, manifest in (("text", plain), ("turns", turns)):
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    model = tiny_model()
    sources = {name: {"path": str(folder / name), "weight": 1.0} for name in ("text", "turns")}
    pieces = [
        Piece(name, tuple(shape), (0, shape[0]), partial(torch.zeros, shape))
        for name, shape in parameter_shapes(model).items()
    ]
    values = {"model": asdict(model), "data": {"seq_len": 64, "sources": sources}}
    save_weights(folder / "checkpoint", pieces, values)
    export(ExportConfig(str(folder / "checkpoint"), str(folder / "out")), Console(quiet=True))
    return folder / "out"


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "which word?"), ("assistant", "hello")],
        [("system", "be kind"), ("user", "a\nb"), ("assistant", "c\n"), ("user", "'d'")],
        [("user", [{"type": "image"}, {"type": "text", "text": "what?"}]), ("assistant", "{{x}}")],
    ],
)
def test_a_template_gives_the_prepared_tokens(exported: Path, messages: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    given = [{"role": role, "content": content} for role, content in messages]
    begun = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(given, tokenize=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert begun[: len(whole)] == whole
    assert tokenizer.decode(begun[len(whole) :]) == '\n<"bégin" 🙂>ai name=assistant\n'
    if given[-1]["role"] != "assistant":
        return
    raw = tokenizer.backend_tokenizer
    raw.encode_special_tokens = True
    example = parse_example({"messages": given}, sum(type(part) is list for _, part in messages))
    layout = image_layout(28, 28, Tiling(28, 14, max_tiles=0))
    tokens, *_ = tokenise_example(example, [layout], IDS, raw)
    if IDS.image in tokens:  # each of its patches has one there
        first = tokens.index(IDS.image) + 1
        assert set(tokens[first : first + layout.num_tokens - 1]) == {IDS.image}
        del tokens[first : first + layout.num_tokens - 1]
    assert [*whole, IDS.end_of_document] == tokens


def test_an_answer_ends_with_its_turn_or_the_document(exported: Path) -> None:
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [IDS.end_turn, IDS.end_of_document]}
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.eos_token_id == IDS.end_turn
    with pytest.raises(Exception, match="a role is none of system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_broken_manifest_is_told_before_the_weights_are_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ValueError(f"{path} is broken")

    monkeypatch.setattr(export_hf, "read_manifest", broken)
    monkeypatch.setattr(export_hf, "_write_shards", lambda *_: pytest.fail("hours of writing"))
    checkpoint = str(exported.parent / "checkpoint")
    with pytest.raises(ValueError, match="text is broken"):
        export(ExportConfig(checkpoint, str(tmp_path / "out")), Console(quiet=True))
    assert not (tmp_path / "out").exists()
