"""How a command ends that fails."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import compose_config

from fulmen.launch import pretrain
from fulmen.launch.hydra_main import open_mappings, run_hydra
from fulmen.launch.report import ReportConfig
from fulmen.trainer.config import GroupConfig, ZeroShotConfig

pytestmark = pytest.mark.fast


def start(
    function: Callable[[Path], object],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: bool,
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "runs=[x]"])
    run_hydra(lambda _: function(folder), "report", ReportConfig, **options)  # type: ignore


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda folder: (folder / "no").read_text(), "error: {}/no: No such file or directory"),
        (lambda folder: (folder / "a").mkdir(), "error: {}/a: File exists"),
        (lambda folder: (folder / "a" / "b").mkdir(), "error: {}/a/b: Not a directory"),
        (lambda folder: folder.read_text(), "error: {}: Is a directory"),
        (lambda folder: (folder / "a").replace(folder), "error: {0}/a -> {0}: "),
    ],
)
def test_files_that_cannot_be_used_end_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[Path], object],
    message: str,
) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(SystemExit, match=f"^{message.format(tmp_path)}") as raised:
        start(function, tmp_path, monkeypatch)
    assert "\n" not in str(raised.value)
    with pytest.raises(OSError, match=r"\[Errno"):
        start(function, tmp_path, monkeypatch, trace_files=True)


def test_faults_without_a_file_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError):
        start(lambda _: raise_lost(), tmp_path, monkeypatch)


def test_a_rank_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "pretrain", lambda _: (tmp_path / "no").read_text())
    monkeypatch.setattr(sys, "argv", ["pretrain", "recipe=text01_tiny"])
    with pytest.raises(FileNotFoundError):
        pretrain.main()


def raise_lost() -> None:
    raise ConnectionResetError(104, "lost")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_many_runs_of_one_command_are_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", flag, "optim.lr=1e-3,2e-3"])
    with pytest.raises(SystemExit, match=r"^error: --multirun .* run_id of its own"):
        pretrain.main()


def test_a_recipe_without_its_first_line_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("seed: 3\n")
    monkeypatch.setattr(
        sys, "argv", ["pretrain", "recipe=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    )
    with pytest.raises(SystemExit, match=r"^error: unknown key recipe: .*# @package _global_"):
        pretrain.main()


def test_groups_of_ones_own_on_the_command_line() -> None:
    words = ["optim.groups.head.match=lm_head", "optim.groups.head.lr_factor=0.5"]
    words += ["evaluation.zero_shot.mine.path=there"]
    config = compose_config([open_mappings(word) for word in words])
    assert config.optim.groups == {"head": GroupConfig("lm_head", lr_factor=0.5)}
    assert config.evaluation.zero_shot == {"mine": ZeroShotConfig("there")}
    with pytest.raises(ValueError, match=r"groups\.head=.*macth.* its keys are match, lr_factor"):
        compose_config([open_mappings("optim.groups.head.macth=lm_head")])
