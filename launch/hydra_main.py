"""What every entry point needs: Hydra, with errors that a user can act on."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

RECIPES = str(Path(__file__).resolve().parent.parent / "recipes")


def run_hydra(
    function: Callable[[Any], None], config_name: str, *, suggest: Callable[[str], list[str]]
) -> None:
    """Compose `recipes/<config_name>.yaml` with the command line and call `function` with it.

    A bad key or value, or a `ValueError` of `function`'s (which says what the user can change),
    ends the process with status 1 and one message, without a traceback. `suggest` gives the known
    keys nearest to an unknown one.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of ending the process
    try:
        hydra.main(version_base="1.3", config_path=RECIPES, config_name=config_name)(function)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, suggest)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def explain(error: Exception, suggest: Callable[[str], list[str]]) -> str:
    """One message for a configuration error, with the nearest known keys for an unknown one."""
    messages = []
    current: BaseException | None = error
    while current is not None:
        messages.append(str(current))
        current = current.__cause__
    text = "\n".join(messages)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    )
    if unknown and re.search(r"Key '\S+' (is )?not in", text):
        near = suggest(unknown.group(1))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown key {unknown.group(1)}{hint}"
    lines = [line for line in dict.fromkeys(text.splitlines()) if not line.startswith("    ")]
    return "\n".join(lines)
