"""The weights of a checkpoint folder, one process and one tensor at a time.

The trainer's own save and load are collective and hold a whole shard of the model; conversion and
inspection need neither. The files are DCP's in both cases.
"""

import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fulmen.models.config import ModelConfig
from fulmen.trainer.config import RunConfig
from fulmen.trainer.manifest import CONFIG_FILE, CheckpointError, describe, write_manifest
from fulmen.trainer.run_config import load_run_config, values_by_key

PREFIX = "model."
FILE_BYTES = 4 * 2**30
"""Aimed size of a file of `save_weights`; DCP holds a file's tensors until it is written."""


def load_model_config(path: Path) -> ModelConfig:
    """The model that a checkpoint folder holds."""
    group = load_run_config(path).get("model")
    if group is None:
        raise CheckpointError(f"{path / CONFIG_FILE} has no group `model`")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), group))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = f"{error}".partition("\n    full_key")[0]
        raise CheckpointError(f"{path / CONFIG_FILE}: model: {reason}") from None
    assert isinstance(config, ModelConfig)
    return config


def check_same_model(path: Path, model: ModelConfig) -> None:
    """`CheckpointError` naming the keys if a checkpoint was trained as another model.

    Many of them (rope_theta, the norms' epsilons, the residual's weights) change no shape, so
    loading alone would not notice.
    """
    stored = load_model_config(path)
    differences = [
        f"model.{item.name} ({getattr(stored, item.name)} there, {getattr(model, item.name)} here)"
        for item in dataclasses.fields(ModelConfig)
        if item.name not in ("softmax_every", "residual_alpha")
        and getattr(stored, item.name) != getattr(model, item.name)
    ]
    # With another depth these two differ anyway, and say nothing more.
    same_depth = stored.num_layers == model.num_layers
    if same_depth and not math.isclose(stored.alpha, model.alpha):
        differences.append(f"model.residual_alpha ({stored.alpha} there, {model.alpha} here)")
    kinds = [[c.is_softmax(layer) for layer in range(c.num_layers)] for c in (stored, model)]
    if same_depth and kinds[0] != kinds[1]:
        differences.append(
            f"model.softmax_every ({stored.softmax_every} there, {model.softmax_every} here)"
        )
    if differences:
        raise CheckpointError(f"{path} is of another model: {', '.join(differences)}")


def changed_keys(path: Path, config: RunConfig) -> list[str]:
    """Each key, with both values, in which a checkpoint's configuration differs from `config`."""
    # A checkpoint from before there was some key was trained with what is its default now.
    default = values_by_key(OmegaConf.to_container(OmegaConf.structured(RunConfig)))
    stored = default | values_by_key(OmegaConf.to_container(load_run_config(path)))
    current = values_by_key(OmegaConf.to_container(OmegaConf.structured(config)))
    return [
        f"{key} was {stored.get(key)}, is {current.get(key)}"
        for key in sorted(stored | current)
        if stored.get(key) != current.get(key)
        and not key.startswith(("checkpoint.", "log.", "run_"))
    ]


class CheckpointWeights:
    """Reads parameters of one checkpoint by their name in `TextModel`."""

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # a torn pickle can raise anything
            raise CheckpointError(f"{path / '.metadata'} cannot be read: {error}") from None
        self._reader.set_up_storage_reader(metadata, True)
        self._stored = {
            name.removeprefix(PREFIX): stored
            for name, stored in metadata.state_dict_metadata.items()
            if name.startswith(PREFIX) and isinstance(stored, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter in the folder."""
        return {name: tuple(stored.size) for name, stored in self._stored.items()}

    def row_groups(self, name: str) -> list[tuple[int, int]]:
        """Row ranges `[first, end)` that cover a parameter and cut none of its stored pieces.

        A stored piece is always read whole, so reading group by group reads every byte once.
        """
        groups: list[tuple[int, int]] = []
        for chunk in sorted(self._stored[name].chunks, key=lambda chunk: chunk.offsets[0]):
            first, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            if groups and first < groups[-1][1]:
                groups[-1] = (groups[-1][0], max(end, groups[-1][1]))
            else:
                groups.append((first, end))
        return groups

    def read(
        self, name: str, *, dtype: torch.dtype = torch.float32, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """A parameter, or its rows `[first, end)`, rounded to `dtype`, on the CPU."""
        stored = self._stored[name]
        first, end = rows or (0, stored.size[0])
        size = torch.Size([end - first, *stored.size[1:]])
        target = torch.empty(size, dtype=dtype)
        wanted = ChunkStorageMetadata(torch.Size([first, *[0] * (len(size) - 1)]), size)
        items = create_read_items_for_chunk_list(PREFIX + name, stored, [wanted])
        covered = sum(item.lengths.numel() for item in items)
        if covered != target.numel():
            raise CheckpointError(f"{name}: the files hold {covered} of {target.numel()} elements")
        self._reader.read_data(LoadPlan(items), _IntoOneTensor(target)).wait()
        return target


class _IntoOneTensor(DefaultLoadPlanner):
    """Puts what is read into one tensor; `copy_` in the reader converts the type."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(begin, begin + length) for begin, length in region)]


@dataclass(frozen=True)
class Piece:
    """Whole rows of a parameter, fetched only when they are written."""

    name: str
    """The parameter, as in `TextModel`."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    rows: tuple[int, int]
    """Range `[first, end)` of the rows."""
    fetch: Callable[[], Tensor]
    """Returns the rows; any floating type."""

    @property
    def size(self) -> torch.Size:
        """Shape of the rows."""
        return torch.Size([self.rows[1] - self.rows[0], *self.shape[1:]])


def save_weights(
    target: Path,
    pieces: Sequence[Piece],
    config: Mapping[str, Any],
    *,
    on_fetch: Callable[[Piece], None] = lambda piece: None,
) -> None:
    """Write a checkpoint folder that holds fp32 weights only; a run can start from it.

    The pieces of one file, `FILE_BYTES`, are in memory at a time. `config` becomes config.yaml. The
    folder appears under its name when it is whole; one that exists is refused.
    """
    with new_folder(target) as folder:
        planner = _PiecePlanner(pieces, on_fetch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            try:
                save({}, storage_writer=_SplitWriter(folder), planner=planner, no_dist=True)
            except CheckpointException as error:  # hides what happened from `except OSError`
                raise error.failures[0][0] from None
        OmegaConf.save(OmegaConf.create(dict(config)), folder / CONFIG_FILE)
        names = sorted(path.name for path in folder.iterdir())
        write_manifest(folder, {name: describe(folder, name) for name in names})


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder `<target>.tmp` that is renamed to `target` at the end, or removed after an error."""
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already: nothing is overwritten, choose another folder")
    temporary = target.with_name(target.name + ".tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError:
        raise ValueError(f"{temporary} is left from an interrupted run: remove it") from None
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class _PiecePlanner(DefaultSavePlanner):
    """Announces every piece and fetches each one when the writer comes to it."""

    def __init__(self, pieces: Sequence[Piece], on_fetch: Callable[[Piece], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_fetch = on_fetch
        self._pieces = {
            MetadataIndex(PREFIX + piece.name, _offset(piece)): piece for piece in pieces
        }

    def create_local_plan(self) -> SavePlan:
        properties = TensorProperties(dtype=torch.float32)
        items = []
        for index, piece in self._pieces.items():
            chunk = ChunkStorageMetadata(_offset(piece), piece.size)
            data = TensorWriteData(chunk, properties, torch.Size(piece.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data={})

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self._pieces[write_item.index]
        tensor = piece.fetch().to(torch.float32)
        assert tensor.shape == piece.size, f"{piece.name}: {tensor.shape} is not {piece.size}"
        self._on_fetch(piece)
        return tensor


class _SplitWriter(FileSystemWriter):
    """Writes a plan as several files, in order; DCP itself would make one, or thousands."""

    def __init__(self, path: Path) -> None:
        # No copy-ahead: with a GPU in the machine it would sort the pieces by size.
        super().__init__(path, thread_count=1, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix = type(plan.storage_data)
        results = []
        for number, items in enumerate(_by_size(plan.items)):
            part = dataclasses.replace(plan, items=items, storage_data=prefix(f"__{number}_"))
            results += super().write_data(part, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _by_size(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    group: list[WriteItem] = []
    total = 0
    for item in items:
        assert item.tensor_data is not None
        size = 4 * item.tensor_data.chunk.sizes.numel()
        if group and total + size > FILE_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def _offset(piece: Piece) -> torch.Size:
    return torch.Size([piece.rows[0], *[0] * (len(piece.shape) - 1)])
