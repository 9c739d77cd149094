"""A checkpoint folder's manifest: which files belong to it, with size and checksum.

The manifest is written last, so a folder that has one was written to its end; a flipped byte or a
lost file is found by comparing with it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "manifest.json"
CONFIG_FILE = "config.yaml"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path, name: str) -> dict[str, int | str]:
    """Size and checksum of file `name` in folder `path`."""
    file = path / name
    return {"bytes": file.stat().st_size, "sha256": checksum(file)}


def write_durably(path: Path, text: str) -> None:
    """Write a file that is still whole if the machine loses power afterwards."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(path: Path, files: Mapping[str, Mapping[str, int | str]]) -> None:
    """Write the manifest of folder `path`, durably and in one step."""
    content = {"version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    temporary = path / (MANIFEST + ".tmp")
    write_durably(temporary, json.dumps(content, indent=1))
    temporary.replace(path / MANIFEST)


def read_manifest(path: Path) -> dict[str, dict[str, int | str]]:
    """File name -> size and checksum; `CheckpointError` if the folder is not a whole checkpoint."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        version, files = content["version"], content["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a whole checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this is {FORMAT_VERSION}")
    return files


def verify(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file, from `part` on, with the manifest; all sizes in any case.

    Several ranks can share the work. Raises `CheckpointError` naming the first bad file.
    """
    for index, (name, expected) in enumerate(read_manifest(path).items()):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}"
            )
        if index % parts == part and checksum(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is corrupt: its checksum differs from the manifest's")
