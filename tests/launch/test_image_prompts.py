"""A checkpoint that sees: what it says to a prompt with images, and how it reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support.pictures import encoded, picture, write_jsonl
from support.seeing import seeing_config, write_conversations
from support.worlds import run_world

from fulmen.launch.evaluate import EvaluateConfig, evaluate
from fulmen.launch.generate import GenerateConfig, quote_prompt, sample
from fulmen.trainer.config import RunConfig
from fulmen.trainer.metrics import read_metrics
from fulmen.trainer.reading.config import ReadingConfig
from fulmen.trainer.reading.examples import read_examples
from fulmen.trainer.run import run


def train(device: torch.device, config: RunConfig) -> Path:
    return run(config, device, "seeing")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("seeing")
    config = seeing_config(write_conversations(folder, answer="it is {}"))
    config.run_root, config.run_id, config.trainer.max_steps = str(folder), "trained", 2
    config.evaluation.reading = ReadingConfig(every_steps=1, max_documents=2, examples=1)
    (run_dir,) = run_world(train, 1, config)
    assert isinstance(run_dir, Path)
    return run_dir


def test_reading_in_the_loop(trained: Path) -> None:
    rows = [row for row in read_metrics(trained / "metrics.jsonl") if "reading/text/anls" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reading/text/exact_match"] <= 1 for row in rows)
    assert [row["step"] for row in read_examples(trained)] == [1, 2]
    page = (trained / "report.html").read_text()
    assert "Read in images: text, step 2" in page
    assert "data:image/png;base64," in page


def test_generation_from_an_image(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(90, 30)))

    def said(**changes: Any) -> str:
        values = {"prompt": "<image>what is it?", "images": [str(path)], "temperature": 0.0}
        sample(GenerateConfig(run=str(trained), max_new_tokens=6, **(values | changes)))
        return capsys.readouterr().out.split("--------\n")[1]

    answer = said()
    assert answer.startswith(f"[{path}]\n<image>what is it?\n")
    assert said(chunk_tokens=5) == answer
    assert said(chat=False) != answer
    assert said(resolution="fixed", dtype="bfloat16")
    assert said(images=[], prompt="what is it?", chat=True)
    path.write_bytes(encoded(picture(90, 30))[:200])
    for changes, message in [
        ({}, rf"image {path} is of no use, (truncated|undecodable)"),
        ({"images": [str(tmp_path / "b.png")]}, r"b\.png cannot be read"),
        ({"images": []}, "1 images in the text, but 0 given"),
        ({"prompt": None}, "images: say what is to be done with them"),
        ({"resolution": "high"}, "resolution=high: must be one of dynamic, fixed"),
        ({"dtype": "half"}, "dtype=half"),
    ]:
        with pytest.raises(ValueError, match=message):
            said(**({"chat": True} | changes))


@pytest.mark.fast
def test_any_prompt_can_be_typed() -> None:
    parser = OverridesParser.create()
    for text in ["<image>what, is 'it'?", 'say "a"', "a\\", '\\" \\\\', "", "two\nlines", "[1, {",
                 "cost: ${e}", "\\${e", '\\\\${a} $${"b"}\\']:  # fmt: skip
        value = parser.parse_override(quote_prompt(f"prompt={text}")).value()
        assert OmegaConf.create({"prompt": value}).prompt == text
    for word in ['prompt="a b"', "prompt=null", "prompts=[a,b]", "run=x"]:
        assert quote_prompt(word) == word


def test_evaluation_of_reading(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(**changes: Any) -> dict[str, Any]:
        evaluate(EvaluateConfig(run=str(trained), output=str(tmp_path / "out"), **changes))
        found: dict[str, Any] = json.loads((tmp_path / "out" / "reading.json").read_text())
        return found

    found = rows(tasks=["reading"], max_documents=3, examples=2)
    assert found["reading/text"].keys() == {"questions", "exact_match", "anls"}
    assert found["reading/text"]["questions"] == 3
    (tmp_path / "a.png").write_bytes(encoded(picture(90, 30)))
    record = {"question": "what is it?", "image": "a.png"}
    data = str(write_jsonl(tmp_path / "x.jsonl", [record | {"answers": ["a", "b"]}] * 2))
    found = rows(tasks=["docvqa"], data=data)
    assert found.keys() == {"reading/text", "docvqa"}
    assert found["docvqa"]["questions"] == 2
    data = str(write_jsonl(tmp_path / "y.jsonl", [record | {"options": ["a", "b"], "answer": 1}]))
    assert rows(tasks=["ai2d"], data=[data])["ai2d"].keys() == {"questions", "exact_match"}
    shown = capsys.readouterr().out
    assert "exact match" in shown
    lines = (tmp_path / "out" / "reading" / "docvqa.jsonl").read_text().splitlines()
    assert [json.loads(line)["truths"] for line in lines] == [["a", "b"]] * 2
    page = (tmp_path / "out" / "reading.html").read_text()
    assert page.count("Read in images") == 3
    assert page.count('<img alt="" src="data:image/png;base64,') >= 2 + 2 + 1


def test_bad_keys_are_named(trained: Path, tiny_data: Path) -> None:
    for changes, message in [
        ({"tasks": ["docvqa"]}, "data is empty: give the files of docvqa"),
        ({"tasks": ["docvqa", "ai2d"], "data": "x"}, "data is of one benchmark"),
        ({"tasks": ["docvqa"], "data": "none.parquet"}, "data=none.parquet: no file"),
        ({"tasks": ["reading"], "sources": ["none"]}, "sources=none: the run has text"),
        ({"tasks": ["reading"], "max_documents": 0}, "max_documents=0"),
        ({"tasks": ["reading"], "max_answer_tokens": 1}, "max_answer_tokens=1 or fewer"),
        (
            {"tasks": ["reading"], "tokenizer": str(tiny_data / "tokenizer.json")},
            "the tokenizer has no token",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(run=str(trained), **changes))
