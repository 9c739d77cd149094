"""A prepared folder under work: begun, gone on with after a kill, or recognised as finished."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fulmen.data.shards import read_manifest
from fulmen.data.tokenise import TOKENIZER_FILE, load_tokenizer, tokenizer_path, train_tokenizer
from fulmen.data.writing import as_json, write_whole

PROGRESS = ".progress"
"""Folder of what is not finished, inside the prepared one."""


@contextlib.contextmanager
def work_on(output: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Claim the folder for these settings, alone, and give its folder of unfinished work.

    ValueError where it holds something else, or another run is at it.
    """
    _claim(output)
    progress = output / PROGRESS
    with open(progress / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output={output}: another run is preparing it") from None
        kept = progress / "settings.json"
        if kept.exists():
            _check_same_settings(output, json.loads(kept.read_text(encoding="utf-8")), settings)
        else:
            write_whole(kept, as_json(settings), temporary_folder=progress)
        for left_over in progress.glob("*.tmp"):
            left_over.unlink()
        yield progress


def check_finished(output: Path, settings: dict[str, Any]) -> None:
    """ValueError unless the whole folder was prepared with these settings and has all its files."""
    manifest = read_manifest(output)
    _check_same_settings(output, manifest["settings"], settings)
    for split in manifest["splits"].values():
        for path, size in _files(output, split["shards"]):
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(
                    f"{path} is missing or has another size than its manifest says: "
                    f"remove {output} and run again"
                )


def kept_shards(output: Path) -> list[dict[str, Any]]:
    """Records of the shards that an interrupted run finished, up to the first unfinished one."""
    shards: list[dict[str, Any]] = []
    while (record := output / PROGRESS / f"shard-{len(shards):05d}.json").exists():
        shard = json.loads(record.read_text(encoding="utf-8"))
        for path, size in _files(output, list(shard["splits"].values())):
            if not path.is_file() or path.stat().st_size != size:
                return shards
        shards.append(shard)
    return shards


def remove_all(output: Path, *, keep_folder: bool) -> None:
    """Take back what was made in a folder that held nothing before."""
    for path in output.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not keep_folder:
        output.rmdir()


def _files(output: Path, parts: list[dict[str, Any]]) -> Iterator[tuple[Path, int]]:
    """Each file that the records of shards name, with its size."""
    for part in parts:
        for kind in (key.removesuffix("_file") for key in part if key.endswith("_file")):
            yield output / part[f"{kind}_file"], part[f"{kind}_bytes"]


def _check_same_settings(output: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{key} ({there.get(key, 'unset')} there, {now.get(key, 'unset')} now)"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"output={output} was prepared or begun with other settings: {', '.join(changed)}: "
            "choose another output, or remove that folder"
        )


def _claim(output: Path) -> None:
    """Make the folder, or make sure that it is ours."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        strange = sorted(path.name for path in output.iterdir())
        if strange and PROGRESS not in strange:
            raise ValueError(
                f"output={output} holds other files ({', '.join(strange[:3])}): give a new or "
                "empty folder"
            )
        (output / PROGRESS).mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={output} cannot be written: {error}") from None


def keep_tokenizer(
    output: Path,
    given: str,
    texts: Callable[[], Iterator[str]],
    *,
    vocab_size: int,
    end_of_document: str,
    special_tokens: Sequence[str],
    say: Callable[[str], object],
) -> Tokenizer:
    """The folder's tokenizer: there from before, a copy of the given one, or trained on `texts`."""
    path = output / TOKENIZER_FILE
    if not path.exists():
        if given == "train":
            say(f"training a tokenizer of {vocab_size} entries ...")
            trained = train_tokenizer(
                texts(),
                vocab_size=vocab_size,
                end_of_document=end_of_document,
                special_tokens=special_tokens,
            )
            content = trained.to_str(pretty=True).encode()
        else:
            content = tokenizer_path(given).read_bytes()
        write_whole(path, content, temporary_folder=output / PROGRESS)
    return load_tokenizer(str(path))
