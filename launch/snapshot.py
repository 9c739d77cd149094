"""A copy of the code for a job, which later edits do not reach."""

import shutil
import subprocess
from pathlib import Path

ROOMS = ("launch", "recipes", "trainer", "parallel", "models", "data", "kernels")
_LEFT_OUT = ("__pycache__", ".git")


def snapshot(source: Path, target: Path, recipes: list[Path]) -> str:
    """Copy the rooms below `source`, uncommitted edits included; says what was copied.

    `recipes` are further folders of the user's, which go among the copied recipes. PYTHONPATH is
    `target/.rooms` for whoever runs the copy.
    """
    for path in _list_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for folder in recipes:
        for path in sorted(folder.rglob("*.yaml")):
            copy = target / "recipes" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():  # as for Hydra, where fulmen's own recipes come first
                shutil.copy2(path, copy)
    links = target / ".rooms" / "fulmen"
    links.mkdir(parents=True)
    for room in ROOMS:
        (links / room).symlink_to(Path("..", "..", room))
    return _state(source, target)


def _list_files(source: Path) -> list[Path]:
    """Tracked and new files of the rooms; what git ignores, or is deleted, is left out."""
    listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *ROOMS)
    if listed:
        paths = [source / name for name in listed.split("\0") if name]
        return [path for path in dict.fromkeys(paths) if path.is_file()]
    return [
        path
        for room in ROOMS
        for path in sorted((source / room).rglob("*"))
        if path.is_file() and not set(path.parts) & set(_LEFT_OUT)
    ]


def _state(source: Path, target: Path) -> str:
    commit = _git(source, "rev-parse", "--short=12", "HEAD").strip()
    if not commit:
        return "code that is no git checkout"
    changes = _git(source, "status", "--porcelain", *ROOMS).splitlines()
    difference = _git(source, "diff", "HEAD", "--", *ROOMS)
    (target / "commit.txt").write_text("\n".join([commit, *changes]) + "\n")
    if difference:
        (target / "uncommitted.patch").write_text(difference)
    edited = f" and {len(changes)} uncommitted file(s)" if changes else ""
    return f"commit {commit}{edited}"


def _git(source: Path, *words: str) -> str:
    """The output of git, or '' where there is none or this is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
