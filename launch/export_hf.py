"""Write a checkpoint as Hugging Face safetensors: `export_hf.py checkpoint=DIR output=DIR`."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from fulmen.data.chat_template import chat_template
from fulmen.data.shards import MANIFEST, read_manifest
from fulmen.launch.hydra_main import run_hydra
from fulmen.models.config import ModelConfig
from fulmen.models.hf import (
    FORMATS,
    Slot,
    check_shapes,
    parameter_shapes,
    released_layout,
    to_hf_config,
    to_preprocessor_config,
)
from fulmen.trainer.manifest import verify
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.weights import CheckpointWeights, load_model_config, new_folder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INDEX = "model.safetensors.index.json"


@dataclass
class ExportConfig:
    """Keys of `export_hf.py`."""

    checkpoint: str = MISSING
    """Checkpoint folder: runs/.../checkpoints/step_N, or an imported one."""
    output: str = MISSING
    """Folder to make."""
    format: str = "released"
    """Kind of config.json: released (minimax_text_01, minimax_vl_01) or transformers (its MiniMax
    class; text models only)."""
    dtype: str = "bfloat16"
    """bfloat16 (the weights are rounded) or float32 (exact)."""
    max_shard_gib: float = 5.0
    """Largest file, unless a single tensor is larger; also about the memory it takes."""


def export(config: ExportConfig, console: Console) -> None:
    """Check the checkpoint, then convert it tensor by tensor; `ValueError` for what can not be."""
    if config.format not in FORMATS:
        raise ValueError(f"format={config.format}: must be one of {', '.join(FORMATS)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype}: must be one of {', '.join(DTYPES)}")
    if config.max_shard_gib <= 0:
        raise ValueError(f"max_shard_gib={config.max_shard_gib}: must be positive")
    checkpoint = Path(config.checkpoint)
    with new_folder(Path(config.output)) as folder:
        console.print(f"verifying {checkpoint}")
        verify(checkpoint)
        model = load_model_config(checkpoint)
        run = load_run_config(checkpoint)
        _write_config(folder, model, config, run)
        weights = CheckpointWeights(checkpoint)
        check_shapes(weights.shapes, parameter_shapes(model), str(checkpoint))
        _copy_tokenizer(folder, run, console)  # a broken manifest is told before hours of writing
        _write_shards(folder, weights, model, config, console)
    if config.dtype == "bfloat16":
        console.print("fp32 weights were rounded to bfloat16; dtype=float32 keeps every bit")
    if config.format == "transformers" and model.rotary_dim != model.head_dim:
        console.print(
            f"warning: model.rotary_dim={model.rotary_dim} of head_dim={model.head_dim}: "
            "the MiniMax class of transformers 5.23 rotates whole heads and computes other values",
            style="yellow",
        )
    console.print(f"wrote {config.output}")


def plan_shards(layout: dict[str, Slot], itemsize: int, max_bytes: float) -> list[list[str]]:
    """Keys of each file, in the layout's order, each file as full as it may be."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, slot in layout.items():
        size = itemsize * torch.Size(slot.shape).numel()
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _write_shards(
    folder: Path,
    weights: CheckpointWeights,
    model: ModelConfig,
    config: ExportConfig,
    console: Console,
) -> None:
    dtype = DTYPES[config.dtype]
    layout = released_layout(model)
    shards = plan_shards(layout, dtype.itemsize, config.max_shard_gib * 2**30)
    total = sum(dtype.itemsize * torch.Size(slot.shape).numel() for slot in layout.values())
    tensors = _released_tensors(weights, layout, dtype)
    weight_map: dict[str, str] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("export", total=total)
        for number, keys in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held = {}
            for key in keys:
                held[key] = next(tensors)
                progress.advance(task, held[key].nbytes)
            save_file(held, folder / name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / name)  # safetensors makes it 0600
            weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def _released_tensors(
    weights: CheckpointWeights, layout: dict[str, Slot], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The layout's tensors in order; as many stacked experts are read as are stored together."""
    first, end, rows = 0, 0, torch.empty(0)
    for slot in layout.values():
        if slot.expert is None:
            yield weights.read(slot.name, dtype=dtype).view(slot.shape)
            continue
        if slot.expert == 0:
            groups = iter(weights.row_groups(slot.name))
            first, end = 0, 0
        if slot.expert >= end:
            first, end = next(groups)
            rows = weights.read(slot.name, dtype=dtype, rows=(first, end))
        yield rows[slot.expert - first].clone()


def _write_config(folder: Path, model: ModelConfig, config: ExportConfig, run: Any) -> None:
    seq_len = OmegaConf.select(run, "data.seq_len")
    if seq_len is None:
        raise ValueError(
            f"{config.checkpoint}/config.yaml has no data.seq_len, which config.json needs as "
            "max_position_embeddings"
        )
    values = to_hf_config(model, config.format, max_position_embeddings=seq_len, dtype=config.dtype)
    _write_json(folder / "config.json", values)
    if model.vision is not None and model.coca is None:
        _write_json(folder / "preprocessor_config.json", to_preprocessor_config(model.vision))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _copy_tokenizer(folder: Path, run: Any, console: Console) -> None:
    """Take tokenizer.json, and where a text ends, from the data sources; all share one."""
    sources = OmegaConf.select(run, "data.sources") or {}
    paths = [Path(source.path) for source in sources.values()]
    tokenizers = [file for path in paths if (file := path / "tokenizer.json").is_file()]
    if not tokenizers:
        console.print("no tokenizer.json in the run's data folders: none was copied")
        return
    shutil.copyfile(tokenizers[0], folder / "tokenizer.json")
    manifests = [read_manifest(path) for path in paths if (path / MANIFEST).is_file()]
    # A conversation is over at the end of a turn, which only sources with turns know.
    manifests.sort(key=lambda manifest: "special_ids" not in manifest)
    if manifests:
        described, ends = _describe_tokenizer(manifests[0])
        _write_json(folder / "tokenizer_config.json", described)
        _write_json(folder / "generation_config.json", {"eos_token_id": ends})


def _describe_tokenizer(manifest: dict[str, Any]) -> tuple[dict[str, str], int | list[int]]:
    """tokenizer_config.json and the tokens that end an answer, by a prepared folder's manifest."""
    end = manifest["end_of_document"]
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end["token"]}
    if "special_ids" not in manifest:
        return described, end["id"]
    names = manifest["settings"]
    template = chat_template(names["begin_turn"], names["end_turn"], names["image_token"])
    described |= {"eos_token": names["end_turn"], "chat_template": template}
    return described, [manifest["special_ids"]["end_turn"], end["id"]]


def progress_bar(console: Console) -> Progress:
    """Bytes done, of all, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
    )


def run(config: ExportConfig) -> None:
    """What Hydra calls; mistakes of the user leave as `ValueError`."""
    try:
        export(config, Console(stderr=True))
    except OSError as error:
        raise ValueError(str(error)) from error


def main() -> None:
    """Entry point."""
    run_hydra(run, "export_hf", ExportConfig)


if __name__ == "__main__":
    main()
