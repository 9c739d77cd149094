"""How a command ends that fails."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fulmen.launch import pretrain
from fulmen.launch.hydra_main import run_hydra
from fulmen.launch.report import ReportConfig

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
