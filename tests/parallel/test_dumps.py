"""A process that does not go on ends itself, and leaves what it was doing."""

import ctypes
import os
import time
from pathlib import Path

import pytest
from support.worlds import run_processes

from fulmen.parallel import dumps, progress
from fulmen.parallel.dumps import Dumps, delete_old, within
from fulmen.parallel.progress import EXIT_HUNG, end_process, ends_within, phase, watched


@pytest.mark.fast
def test_a_dump_has_threads_stacks_and_why(tmp_path: Path) -> None:
    made = Dumps(tmp_path / "run" / "dumps" / "1", 3)
    for _ in range(dumps.MOST + 2):
        made.write("forward takes long")
    files = sorted(path.name for path in made.folder.iterdir() if path.suffix == ".txt")
    assert files == ["rank3-2.txt", "rank3-3.txt", "rank3.txt"]
    said = (made.folder / "rank3.txt").read_text()
    assert "rank 3: forward takes long" in said.splitlines()[0]
    assert "Python thread MainThread" in said
    assert "test_a_dump_has_threads_stacks_and_why" in said


@pytest.mark.fast
def test_a_dump_never_waits_for_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dumps, "WRITE_S", 0.2)
    # Opening a pipe that nobody reads waits for ever.
    os.mkfifo(tmp_path / "rank0.txt")
    Dumps(tmp_path, 0).write("a stalled disk")
    said = capfd.readouterr().err
    assert f"{tmp_path} could not be written" in said
    assert "test_a_dump_never_waits_for_a_file_system" in said
    with (tmp_path / "rank0.txt").open():  # lets the thread go
        pass


@pytest.mark.fast
def test_old_dumps_are_deleted(tmp_path: Path) -> None:
    for day in range(10, 25):
        (tmp_path / f"202601{day}-000000").mkdir()
    delete_old(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"202601{day}-000000" for day in range(15, 25)]


@pytest.mark.fast
def test_what_fails_or_hangs_within_a_limit_is_false() -> None:
    assert within(5.0, lambda: None)
    assert not within(5.0, lambda: 1 / 0)
    assert not within(0.05, lambda: time.sleep(0.5))


# ---- processes ----


def hang(way: str, folder: Path) -> None:
    """One process that does not go on in its second step."""
    with (folder / "stderr").open("wb") as file:
        os.dup2(file.fileno(), 2)
    # A watch that comes late on a busy machine must not seem to be one that cannot run.
    progress.INTERVAL_S, progress.END_LATER_S = 0.1, {"lock": 0.5, "sleep": 3.0}.get(way, 60.0)
    with watched(0, 1, 1.0, run_dir=folder):
        phase("data", 1)
        phase("data", 2)
        if way == "lock":
            ctypes.PyDLL(None).sleep(60)  # Python's lock is kept, as by a page of a mapped file
        if way == "sleep":
            time.sleep(60)
        if way == "close":
            with ends_within(0.3, "to close"):
                time.sleep(60)
        end_process("there is no more to be done")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "status", "told"),
    [
        ("sleep", EXIT_HUNG, "rank 0 is in data (step 2, position 1): it stands still for "),
        ("lock", 1, "Timeout (0:00:02)!"),
        ("close", EXIT_HUNG, "to close took longer than 0 s: this process ends itself"),
        ("end", EXIT_HUNG, "there is no more to be done"),
    ],
)
def test_a_single_process_that_hangs_ends_itself(
    way: str, status: int, told: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=rf"died: {status}$"):
        run_processes(hang, [{}], way, tmp_path)
    said = (tmp_path / "stderr").read_text()
    assert told in said
    if way == "lock":  # the watch could not run
        assert "in hang" in said
    else:
        (folder,) = (tmp_path / "dumps").iterdir()
        assert "in hang" in (folder / "rank0.txt").read_text()
        assert f"stacks: {folder}" in said
