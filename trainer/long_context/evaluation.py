"""One checkpoint's results: rows of cells, kept as they come, with a table and pictures."""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from fulmen.data.config import SourceConfig
from fulmen.data.shards import PreparedSplit
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.long_context.pictures import draw_curves, draw_heat_map, short_length
from fulmen.trainer.long_context.positions import PositionLoss, position_loss
from fulmen.trainer.long_context.tasks import Cell, depths_of, open_language, score_cells
from fulmen.trainer.prefill import Reader
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.weights import load_model_config

RESULTS = "results.json"


@dataclass(frozen=True)
class Settings:
    """What the results depend on besides the checkpoint."""

    tasks: list[str]
    position_loss: bool
    lengths: list[int]
    depths: int
    samples: int
    seed: int
    dtype: str


class Results:
    """results.json, written after each row, so that a killed evaluation goes on behind the last."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """`facts` decide whether rows that are there already hold."""
        self.path = path
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.changed = [
            f"{key} ({kept.get(key, 'unset')} there, {facts[key]} now)"
            for key in facts
            if kept and kept.get(key) != facts[key]
        ]
        """What keeps the rows that are there from holding."""
        self.rows: dict[str, dict[str, Any]] = {} if self.changed else kept.get("rows", {})
        self._facts = facts

    def set_aside(self) -> Path:
        """Keep the rows that do not hold under the first free name; returns it."""
        names = (self.path.with_name(f"{self.path.stem}.{n}.json") for n in itertools.count(1))
        return self.path.rename(next(name for name in names if not name.exists()))

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep the row `TASK/LENGTH`."""
        self.rows[name] = row
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self._facts | {"rows": self.rows}, indent=1))
        temporary.replace(self.path)


def evaluate_checkpoint(
    reader: Reader,
    checkpoint: Path,
    tokenizer: Path,
    output: Path,
    settings: Settings,
    mesh: Mesh | None = None,
) -> None:
    """Every task at every length, short ones first; all ranks call it, rank 0 writes and prints."""
    is_first = mesh is None or mesh.rank == 0
    console = Console(quiet=not is_first)
    if is_first:
        output.mkdir(parents=True, exist_ok=True)
    run = load_run_config(checkpoint)
    vocab_size = load_model_config(checkpoint).vocab_size
    sources = {
        name: SourceConfig(path=source.path)
        for name, source in (OmegaConf.select(run, "data.sources") or {}).items()
    }
    facts = {
        "checkpoint": str(checkpoint),
        "tokenizer": str(tokenizer),
        "trained_length": OmegaConf.select(run, "data.seq_len"),
        **{key: getattr(settings, key) for key in ("depths", "samples", "seed", "dtype")},
    }
    # What is kept decides what is left to do: on all ranks the same, before rank 0 writes more.
    results = Results(output / RESULTS, facts)
    wait_for_all(mesh)
    if is_first and results.changed:
        console.print(
            f"warning: {results.path} was measured with other settings, "
            f"{', '.join(results.changed)}: its rows are kept in {results.set_aside().name}",
            highlight=False,
            soft_wrap=True,
        )
    if settings.tasks:
        language = open_language(sources, vocab_size=vocab_size, tokenizer=tokenizer)
    for length in settings.lengths:
        for task in settings.tasks:
            name = f"{task}/{length}"
            if name in results.rows:
                continue
            cells = [Cell(task, length, depth) for depth in depths_of(settings.depths)]
            scores = score_cells(
                reader, language, cells, samples=settings.samples, seed=settings.seed, mesh=mesh
            )
            by_depth = {
                f"{cell.depth:.3f}": asdict(score) | {"accuracy": score.accuracy}
                for cell, score in zip(cells, scores, strict=True)
            }
            right = sum(score.right for score in scores) / sum(score.answers for score in scores)
            console.print(f"{task} {short_length(length)}: {right:.0%}", highlight=False)
            if is_first:
                results.add(name, {"accuracy": right, "depths": by_depth})
    if settings.position_loss:
        for source, place in sources.items():
            _add_position_losses(
                results, reader, source, place, vocab_size, settings, mesh, console, is_first
            )
    if is_first:
        console.print(make_table(results.rows))
        draw(output, results.rows, facts["trained_length"])
        console.print(f"results: {output}", highlight=False)


def wait_for_all(mesh: Mesh | None) -> None:
    """Until every rank has come here."""
    if mesh is not None:
        import torch.distributed as dist

        dist.barrier()


def _add_position_losses(
    results: Results,
    reader: Reader,
    name: str,
    source: SourceConfig,
    vocab_size: int,
    settings: Settings,
    mesh: Mesh | None,
    console: Console,
    is_first: bool,
) -> None:
    split = PreparedSplit(source.path, "valid", name=name, vocab_size=vocab_size, verify=False)
    if split.images is not None:
        console.print(
            f"warning: position_loss: {name} has images, which it does not show: left out"
        )
        return
    # A longer length's curve holds a shorter one's, but of fewer documents.
    for length in settings.lengths:
        row = f"position_loss/{name}/{length}"
        if row in results.rows:
            continue
        loss = position_loss(reader, split, length=length, samples=settings.samples, mesh=mesh)
        if loss is None:
            longer = ", ".join(str(other) for other in settings.lengths if other >= length)
            console.print(
                f"warning: position_loss: {name} has no held-out document of {length} tokens: "
                f"no row for lengths={longer}",
                soft_wrap=True,
            )
            return
        if is_first:
            results.add(row, asdict(loss))


def make_table(rows: dict[str, dict[str, Any]]) -> Table:
    """Accuracy by task and length."""
    cells = {tuple(name.split("/")): row for name, row in rows.items() if "accuracy" in row}
    lengths = sorted({int(length) for _, length in cells})
    table = Table("task", *(short_length(length) for length in lengths))
    for task in dict.fromkeys(task for task, _ in cells):
        found = [cells.get((task, str(length))) for length in lengths]
        table.add_row(task, *("" if row is None else f"{row['accuracy']:.0%}" for row in found))
    return table


def draw(output: Path, rows: dict[str, dict[str, Any]], trained_length: int | None) -> None:
    """A heat map of each retrieval task, and the curves of the longest documents."""
    maps: dict[str, dict[int, dict[float, float]]] = {}
    curves: dict[str, tuple[int, PositionLoss]] = {}
    for name, row in rows.items():
        task, *middle, length = name.split("/")
        if task == "position_loss":
            source = "/".join(middle)
            if int(length) >= curves.get(source, (0, None))[0]:
                curves[source] = int(length), PositionLoss(**row)
        else:
            by_depth = {float(depth): cell["accuracy"] for depth, cell in row["depths"].items()}
            maps.setdefault(task, {})[int(length)] = by_depth
    for task, accuracies in maps.items():
        path = output / f"{task}.png"
        draw_heat_map(path, accuracies, title=task, trained_length=trained_length)
    if curves:
        marks = [trained_length] if trained_length else []
        shown = {source: curve for source, (_, curve) in curves.items()}
        draw_curves(output / "position_loss.png", shown, title="loss by position", marks=marks)
