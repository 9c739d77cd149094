"""How the plan fills the seams that layers offer, with a note for the audit."""

from collections.abc import Callable
from typing import Any

from torch import nn

_NOTES = "seam_notes"


def fill_seam(module: nn.Module, seam: str, function: Callable[..., Any], note: str) -> None:
    """Replace the method `seam` of a layer; `note` says how it works now, in a few words."""
    assert callable(getattr(module, seam))
    setattr(module, seam, function)
    vars(module).setdefault(_NOTES, {})[seam] = function, note


def filled_with(module: nn.Module, seam: str) -> str | None:
    """How a seam was filled, or None where the layer still has its own way."""
    function = vars(module).get(seam)
    if function is None:
        return None
    noted, note = vars(module).get(_NOTES, {}).get(seam, (None, ""))
    if noted is function:
        return note
    return getattr(getattr(function, "func", function), "__name__", repr(function))
