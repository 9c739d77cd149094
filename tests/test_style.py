"""Budgets and the direction of imports."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "parallel": {"models", "kernels"},
    "data": {"models", "kernels"},
    "trainer": {"parallel", "data", "models", "kernels"},
    "launch": {"trainer", "parallel", "data", "models", "kernels"},
    "recipes": {"trainer", "parallel", "data", "models", "kernels"},
}
"""Room -> rooms that it may import besides itself."""
FILE_LINES = 600
FUNCTION_LINES = 80
TIGHTER = {"trainer/loop.py": 400, "parallel/plan.py": 150}
RECIPE_LINES = 120


def sources(*rooms: str) -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every Python file of the rooms."""
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def imports(text: str) -> set[str]:
    """Dotted names of all modules and members that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(room: str, text: str) -> set[str]:
    allowed = MAY_IMPORT[room] | {room}
    named = {name for name in imports(text) if name.split(".")[0] == "fulmen"}
    wrong = {name for name in named if name == "fulmen" or name.split(".")[1] not in allowed}
    if room in ("models", "kernels"):
        wrong |= {name for name in imports(text) if name.startswith("torch.distributed")}
    # The rooms' own names would collide with packages that others import.
    return wrong | {name for name in imports(text) if name.split(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_go_one_way(room: str) -> None:
    checked = 0
    for path, text in sources(room):
        assert wrong_imports(room, text) == set(), path
        checked += 1
    assert checked


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", "from fulmen.models.config import ModelConfig"),
        ("models", "from fulmen.parallel.mesh import Mesh"),
        ("models", "import torch.distributed as dist"),
        ("models", "def f():\n    from torch import distributed"),
        ("data", "from fulmen.parallel.mesh import Mesh"),
        ("parallel", "from fulmen.data.loader import PackedLoader"),
        ("parallel", "from fulmen.trainer.config import RunConfig"),
        ("trainer", "import fulmen.launch.pretrain"),
        ("trainer", "from fulmen import launch"),
        ("trainer", "from data.loader import PackedLoader"),
    ],
)
def test_wrong_imports_are_found(room: str, line: str) -> None:
    assert wrong_imports(room, line)


def test_files_are_short() -> None:
    for path, text in sources(*MAY_IMPORT, "tests", "benchmarks"):
        assert len(text.splitlines()) <= TIGHTER.get(path, FILE_LINES), path
    assert all((ROOT / path).exists() for path in TIGHTER)


def test_functions_are_short() -> None:
    for path, text in sources(*MAY_IMPORT, "tests", "benchmarks"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                # Of the body: a kernel's parameters, a line each, are no complexity.
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def test_recipes_are_short() -> None:
    recipes = list((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert len(path.read_text().splitlines()) <= RECIPE_LINES, path


def test_code_is_ascii() -> None:
    for path, text in sources(*MAY_IMPORT):
        assert text.isascii(), path


def test_no_package_registry_is_named_by_address() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    address = re.compile(
        rb"https?://[^\s\"'<>)]*(pypi|pythonhosted|anaconda|npmjs|/simple\b)", re.I
    )
    option = re.compile(rb"--(extra-)?index-url|find-links", re.I)
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and path != Path(__file__).resolve():
            content = path.read_bytes()
            assert not address.search(content), name
            assert not option.search(content), name
