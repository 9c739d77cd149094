"""What every entry point needs: Hydra, with errors that a user can act on."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fulmen.trainer.config import nearest_keys, to_dataclass

RECIPES = str(Path(__file__).resolve().parent.parent / "recipes")
Schema = TypeVar("Schema")
_OPEN = (
    r"data\.sources\.[^.=]+\.(path|weight)="
    r"|(optim\.groups|evaluation\.zero_shot)\.[^.=]+\.[^=]+="
    r"|stages\.[^.=]+\.(lengths|weights|late_weights)\.[^.=]+="
    r"|stages\.[^.=]+\.(parallel|trainer|optim|preference|evaluation|health)\.[^=]+="
    r"|fields\.[^.=]+="
    r"|slurm\.sweep="
)
_NO_ENTRY = ": the recipe has no entry of that name (--cfg job prints those that it has)"


def open_mappings(override: str) -> str:
    """Let an override also add what the recipe does not have, where names are the user's own.

    That is `data.sources.NAME.path=...`, so `optim.groups` and `evaluation.zero_shot`, a key of
    one of a stage's mappings, as in `stages.NAME.parallel.cp=...`, `fields.NAME=...` of
    prepare_images, and `slurm.sweep={KEY: ...}`.
    """
    if override.startswith("data.sources="):
        sys.exit(
            "error: data.sources=...: name each source, data.sources.NAME.path=FOLDER, and take a "
            "recipe's own out with ~data.sources.NAME"
        )
    return f"++{override}" if re.match(_OPEN, override) else override


def run_hydra(
    function: Callable[[Schema], None],
    config_name: str,
    schema: type[Schema],
    not_needed: tuple[str, ...] = (),
    *,
    trace_files: bool = False,
) -> None:
    """Compose `recipes/<config_name>.yaml` with the command line and call `function` with it.

    The YAML's first default is `<config_name>_schema`, which stands for `schema`. A bad key or
    value, a `ValueError` of `function`'s (which says what the user can change), or a file that
    cannot be used ends the process with status 1 and one message, without a traceback; with
    `trace_files`, files leave one, for a command whose files are not only those that it was given.
    Keys that begin with one of `not_needed` may be left without a value.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of ending the process

    def call(composed: Any) -> None:
        for key in OmegaConf.missing_keys(composed):
            if key.startswith(not_needed):
                OmegaConf.update(composed, key, "not given")
        try:
            function(to_dataclass(composed, schema))
        except OmegaConfBaseException:  # some are ValueErrors too
            raise
        except ValueError as error:
            sys.exit(f"error: {error}")  # Hydra would put a line of its own before ours
        except OSError as error:
            if trace_files or error.filename is None:
                raise
            names = [str(name) for name in (error.filename, error.filename2) if name is not None]
            sys.exit(f"error: {' -> '.join(names)}: {error.strerror}")

    if {"-m", "--multirun"} & set(sys.argv[1:]):
        # With one run_id, the run of the second value would go on with that of the first.
        sys.exit(
            "error: --multirun is not for these commands: start one for each value, a run with a "
            "run_id of its own, or let launch/submit.py do it (slurm.sweep, docs/operations.md)"
        )
    sys.argv[1:] = [open_mappings(word) for word in sys.argv[1:]]
    try:
        hydra.main(version_base="1.3", config_path=RECIPES, config_name=config_name)(call)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, schema)}")


def explain(error: Exception, schema: type) -> str:
    """One message for a configuration error, with the nearest known keys for an unknown one."""
    messages = []
    current: BaseException | None = error
    while current is not None:
        messages.append(str(current))
        current = current.__cause__
    text = "\n".join(messages)
    unknown = re.search(r"Could not override '([^']+)'|full_key: (\S+)", text)
    if unknown and re.search(r"Key '\S+' (is )?not in", text):
        key = unknown.group(1) or unknown.group(2)
        near = nearest_keys(key, schema)
        if key == "recipe":
            return (
                "unknown key recipe: a recipe's keys are a run's own only if its file begins with "
                "the line `# @package _global_`"
            )
        if key in near:
            return f"unknown key {key}{_NO_ENTRY}"
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown key {key}{hint}"
    added = re.search(r"Error merging override \+\+(stages\.[^=]+)=", text)
    if added and "is not a subclass of StageConfig" in text:
        return f"unknown key {added.group(1)}{_NO_ENTRY}"
    lines = [line for line in dict.fromkeys(text.splitlines()) if not line.startswith("    ")]
    return "\n".join(lines)
