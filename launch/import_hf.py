"""Make a checkpoint folder from Hugging Face safetensors: `import_hf.py input=DIR output=DIR`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fulmen.launch.export_hf import INDEX, progress_bar
from fulmen.launch.hydra_main import run_hydra
from fulmen.models.config import ModelConfig
from fulmen.models.hf import (
    check_shapes,
    from_hf_config,
    is_decay_buffer,
    parameter_shapes,
    released_layout,
    text_values,
)
from fulmen.trainer.weights import Piece, save_weights

FLOATS = ("F32", "BF16", "F16")


@dataclass
class ImportConfig:
    """Keys of `import_hf.py`."""

    input: str = MISSING
    """Folder with config.json and safetensors files, released keys, either kind of config.json."""
    output: str = MISSING
    """Checkpoint folder to make."""


class ReleasedFiles:
    """The tensors of a folder of safetensors files, found by key and read when asked for."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._files = {}
        self._file_of_key: dict[str, str] = {}
        shapes, dtypes = {}, {}
        listed = _listed_keys(folder)
        for name in sorted(set(listed.values())) if listed else ["model.safetensors"]:
            file = self._files[name] = _open(folder / name)
            for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                if is_decay_buffer(key, model):
                    continue
                if key in self._file_of_key:
                    raise ValueError(
                        f"{folder}: {self._file_of_key[key]} and {name} both hold {key}"
                    )
                entry = file.get_slice(key)
                self._file_of_key[key] = name
                shapes[key], dtypes[key] = tuple(entry.get_shape()), entry.get_dtype()
        expected = {key: slot.shape for key, slot in released_layout(model).items()}
        check_shapes(shapes, expected, str(folder))
        _check_index(folder, listed, self._file_of_key)
        odd = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in FLOATS]
        if odd:
            kinds, shown = ", ".join(FLOATS), ", ".join(odd[:5])
            raise ValueError(f"{folder}: {len(odd)} tensors are none of {kinds}: {shown}")

    def read(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        return self._files[self._file_of_key[key]].get_tensor(key)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object")
    return values


def import_released(config: ImportConfig, console: Console) -> None:
    """Check every key and shape first, then convert tensor by tensor to fp32."""
    folder = Path(config.input)
    values = read_config(folder)
    try:
        model = from_hf_config(values)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    files = ReleasedFiles(folder, model)
    pieces = weight_pieces(files, model)
    run: dict[str, Any] = {"model": asdict(model)}
    longest = text_values(values).get("max_position_embeddings")
    if longest is not None:
        run["data"] = {"seq_len": int(longest)}
    with progress_bar(console) as progress:
        total = sum(4 * piece.size.numel() for piece in pieces)
        task = progress.add_task("import", total=total)
        save_weights(
            Path(config.output),
            pieces,
            run,
            on_fetch=lambda piece: progress.advance(task, 4 * piece.size.numel()),
        )
    console.print(f"wrote {config.output}")


def weight_pieces(files: ReleasedFiles, model: ModelConfig) -> list[Piece]:
    """What is to be written, each released tensor one piece of one of our parameters."""
    shapes = parameter_shapes(model)
    pieces = []
    for key, slot in released_layout(model).items():
        whole = shapes[slot.name]
        if slot.expert is None:
            rows, shape = (0, whole[0]), whole
        else:
            rows, shape = (slot.expert, slot.expert + 1), (1, *slot.shape)
        fetch = lambda key=key, shape=shape: files.read(key).view(shape)  # noqa: E731
        pieces.append(Piece(slot.name, whole, rows, fetch))
    return pieces


def _listed_keys(folder: Path) -> dict[str, str]:
    """Key -> file by the index, or nothing for a folder with one file and no index."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / "model.safetensors").exists():
            raise ValueError(f"{folder} holds neither {INDEX} nor model.safetensors")
        return {}
    try:
        listed = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{path} cannot be read: weight_map must give each key the name of a file")
    return listed


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def _check_index(folder: Path, listed: Mapping[str, str], found: Mapping[str, str]) -> None:
    """An index that disagrees with its files is refused: a reader that trusts it would go wrong."""
    wrong = [key for key, name in found.items() if listed and listed.get(key) != name]
    if wrong:
        raise ValueError(
            f"{folder / INDEX} names the wrong file for {len(wrong)} keys: {', '.join(wrong[:5])}"
        )


def run(config: ImportConfig) -> None:
    """What Hydra calls; mistakes of the user leave as `ValueError`."""
    try:
        import_released(config, Console(stderr=True))
    except OSError as error:
        raise ValueError(str(error)) from error


def main() -> None:
    """Entry point."""
    run_hydra(run, "import_hf", ImportConfig)


if __name__ == "__main__":
    main()
