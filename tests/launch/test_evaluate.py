"""Evaluation and generation from a run's checkpoint, on one process and on several."""

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.tiny import tiny_config
from support.worlds import free_port, rank_environment, run_processes, run_world

from fulmen.launch.evaluate import EvaluateConfig, evaluate
from fulmen.launch.generate import GenerateConfig, sample
from fulmen.parallel.config import ParallelConfig
from fulmen.trainer import load, run_folder
from fulmen.trainer.config import RunConfig
from fulmen.trainer.run import run


def train(device: torch.device, config: RunConfig) -> Path:
    return run(config, device, "tiny")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a checkpoint."""
    config = tiny_config(tiny_data, max_steps=2)
    config.run_root, config.run_id = str(tmp_path_factory.mktemp("runs")), "trained"
    (folder,) = run_world(train, 1, config)
    assert isinstance(folder, Path)
    return folder


def settings(trained: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "run": str(trained),
        "tasks": ["niah", "tracking", "position_loss"],
        "lengths": [40, 700],
        "depths": 2,
        "samples": 2,
        "chunk_tokens": 100,
    }
    return EvaluateConfig(**(values | changes))


def evaluate_tasks(config: EvaluateConfig) -> None:
    evaluate(config)


def rows_of(folder: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((folder / "results.json").read_text())["rows"]
    return rows


def test_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no room for its facts"):
        evaluate(settings(trained))
    evaluate(settings(trained, lengths=[600, 700]))
    folder = trained / "evaluation" / "step_2"
    rows = rows_of(folder)
    retrieval = {f"{task}/{length}" for task in ("niah", "tracking") for length in (600, 700)}
    assert rows.keys() == retrieval  # and no document is so long
    for name in retrieval:
        assert set(rows[name]["depths"]) == {"0.000", "1.000"}
        assert rows[name]["depths"]["1.000"]["answers"] == 2
    shown = capsys.readouterr().out
    assert "text has no held-out document of 600 tokens" in shown
    assert "600" in shown
    assert "tracking" in shown
    assert (folder / "niah.png").exists()

    evaluate(settings(trained, tasks=["position_loss"], lengths=[30], output=str(tmp_path)))
    found = rows_of(tmp_path)["position_loss/text/30"]
    assert found["documents"] == 2
    assert all(3 < loss < 9 for loss in found["losses"])  # about log of 301
    assert (tmp_path / "position_loss.png").exists()


def test_what_is_done_is_not_done_again(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    same = {"tasks": ["niah"], "output": str(tmp_path)}
    evaluate(settings(trained, lengths=[600], **same))
    first = rows_of(tmp_path)
    capsys.readouterr()
    evaluate(settings(trained, lengths=[600, 650], **same))
    assert rows_of(tmp_path).keys() == {"niah/600", "niah/650"}
    assert rows_of(tmp_path)["niah/600"] == first["niah/600"]
    assert "niah 600:" not in capsys.readouterr().out
    evaluate(settings(trained, lengths=[600], samples=1, **same))
    assert rows_of(tmp_path).keys() == {"niah/600"}
    shown = capsys.readouterr().out
    assert "samples (2 there, 1 now): its rows are kept in results.1.json" in shown
    kept = json.loads((tmp_path / "results.1.json").read_text())["rows"]
    assert kept.keys() == {"niah/600", "niah/650"}
    evaluate(settings(trained, lengths=[600], samples=1, dtype="bfloat16", **same))
    shown = capsys.readouterr().out
    assert "dtype (float32 there, bfloat16 now): its rows are kept in results.2.json" in shown
    assert "niah 600:" in shown


def test_position_loss_needs_documents(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only = {"tasks": ["position_loss"], "output": str(tmp_path / "out")}
    evaluate(settings(trained, lengths=[30, 600, 700], **only))
    assert rows_of(tmp_path / "out").keys() == {"position_loss/text/30"}
    shown = capsys.readouterr().out
    assert "warning: position_loss: text has no held-out document of 600 tokens" in shown
    assert "no row for lengths=600, 700" in shown
    imported = tmp_path / "imported"
    shutil.copytree(trained / "checkpoints" / "step_2", imported)
    config = OmegaConf.load(imported / "config.yaml")
    del config.data.sources
    OmegaConf.save(config, imported / "config.yaml")
    tokenizer = str(tmp_path / "tokenizer.json")
    Path(tokenizer).write_text("{}")
    only |= {"run": None, "checkpoint": str(imported), "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="imported names no data"):
        evaluate(settings(trained, lengths=[30], **only))


@pytest.mark.parametrize(
    ("size", "parallel"),
    [(2, ParallelConfig(cp=2)), (2, ParallelConfig(zero_stage=3))],
    ids=["cp 2", "dp 2"],
)
def test_over_ranks(size: int, parallel: ParallelConfig, trained: Path, tmp_path: Path) -> None:
    for tasks in [
        {"tasks": ["niah"], "lengths": [600]},
        {"tasks": ["position_loss"], "lengths": [30]},
    ]:
        alone, spread = tmp_path / f"{tasks['tasks'][0]}", tmp_path / f"{tasks['tasks'][0]} spread"
        evaluate(settings(trained, output=str(alone), **tasks))
        config = settings(trained, output=str(spread), parallel=parallel, **tasks)
        port = free_port()
        environments = [rank_environment(rank, size, port) for rank in range(size)]
        run_processes(evaluate_tasks, environments, config)
        ((name, wanted),) = rows_of(alone).items()
        found = rows_of(spread)[name]
        if "losses" in wanted:
            assert found.pop("losses") == pytest.approx(wanted.pop("losses"), rel=1e-5)
        assert found == wanted


def test_bad_keys_are_named(trained: Path) -> None:
    for changes, message in [
        ({"run": None}, "either run="),
        ({"run": str(trained / "no")}, "has no checkpoint"),
        ({"tasks": ["haystack"]}, "tasks=haystack: choose from niah.* position_loss, reading"),
        ({"tasks": []}, "tasks is empty"),
        ({"lengths": []}, "lengths is empty"),
        ({"dtype": "half"}, "dtype=half"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"parallel": ParallelConfig(cp=2)}, r"parallel.cp=2 .* 1 process"),
        ({"run": None, "checkpoint": str(trained / "checkpoints" / "step_2")}, "give output="),
        ({"run": None, "checkpoint": str(trained), "output": "x"}, "is not a whole checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(settings(trained, **changes))


def test_generation_reads_a_prompt_in_pieces(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for chunk_tokens in (1, 3, 100):
        sample(
            GenerateConfig(
                checkpoint=str(trained / "checkpoints" / "step_2"),
                prompts=["abc def abc def abc"],
                max_new_tokens=8,
                temperature=0.0,
                chunk_tokens=chunk_tokens,
            )
        )
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]


def test_samples_of_a_run_that_cannot_be_written(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_folder, "update_summary", refuse)
    sample(GenerateConfig(run=str(trained), prompts=["abc"], max_new_tokens=2))
    said = capsys.readouterr().out
    assert "abc" in said
    assert f"not added to the report of run={trained}: " in said


def test_what_generation_refuses(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it before the model is loaded."""
    monkeypatch.setattr(load, "load_model", None)
    no_tokenizer = tmp_path / "tokenizer.json"
    no_tokenizer.write_text('{"a": 1}')

    def refused(message: str, **changes: Any) -> None:
        values = {"run": str(trained), "prompts": ["a"]}
        with pytest.raises(ValueError, match=message):
            sample(GenerateConfig(**(values | changes)))

    refused("chunk_tokens=0: must be at least 1", chunk_tokens=0)
    refused("top_k=0: must be at least 1", top_k=0)
    refused("max_new_tokens=-3: must be at least 0", max_new_tokens=-3)
    for temperature in (-1.0, math.nan, math.inf):
        refused(f"temperature={temperature}: must be", temperature=temperature)
    refused("seed=9223372036854775808: must be", seed=2**63)
    refused("prompts is empty", prompts=[])
    refused("prompt '' has no tokens", prompts=["a", "", "b"])
    refused("is not UTF-8", prompt="\udcff bad")
    refused(f"{no_tokenizer} is not a tokenizer.json", tokenizer=str(no_tokenizer))
    refused(f"{no_tokenizer} is not a tokenizer.json", tokenizer=str(tmp_path))  # its folder
    refused("images: the model has no eyes", prompt="a", images=["none.png"])
    refused("is not a whole checkpoint", run=None, checkpoint=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("in one process")
