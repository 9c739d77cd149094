"""Which implementation of an op runs: the best that the machine has, unless configuration says.

Every op lists its implementations, best first, each with the reason why it cannot take the call.
The choice is logged once. `kernels.<op>=<implementation>` in a run's configuration overrides it.
"""

import logging
from collections.abc import Mapping

import torch

from fulmen.kernels.common import NEEDS_CUDA
from fulmen.kernels.config import AUTO, IMPLEMENTATIONS

log = logging.getLogger("fulmen.kernels")

# One process trains one model: what was asked for, and what was already logged, hold for all of it.
_overrides: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


def configure(choices: Mapping[str, str]) -> None:
    """Ask for implementations by op; `auto` takes back an earlier request.

    Raises:
        ValueError: an unknown name. Whether the machine has it shows when the op first runs.
    """
    for op, name in choices.items():
        if op not in IMPLEMENTATIONS:
            raise ValueError(f"kernels.{op}: no such op; there are {', '.join(IMPLEMENTATIONS)}")
        if name not in (AUTO, *IMPLEMENTATIONS[op]):
            raise ValueError(
                f"kernels.{op}={name}: must be auto or one of {', '.join(IMPLEMENTATIONS[op])}"
            )
        if name == AUTO:
            _overrides.pop(op, None)
        else:
            _overrides[op] = name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(op: str, *candidates: tuple[str, str]) -> str:
    """Name of the implementation to run.

    Args:
        op: a name of IMPLEMENTATIONS.
        candidates: (implementation, why it cannot take this call or ""), best first.

    Raises:
        ValueError: the configured implementation cannot take the call, or none can.
    """
    assert {name for name, _ in candidates} <= set(IMPLEMENTATIONS[op])
    wanted = _overrides.get(op)
    if wanted is not None:
        reasons = dict(candidates)
        if reasons.get(wanted):
            raise ValueError(f"kernels.{op}={wanted}: {reasons[wanted]}")
        name = wanted
    else:
        usable = [name for name, reason in candidates if not reason]
        if not usable:
            raise ValueError(f"{op}: " + "; ".join(f"{name}: {why}" for name, why in candidates))
        name = usable[0]
    if (op, name) not in _logged:
        _logged.add((op, name))
        better = candidates[: [candidate for candidate, _ in candidates].index(name)]
        passed = [f"{other} {why}" for other, why in better if why != NEEDS_CUDA]
        if name == "torch" and passed and not wanted:
            # Where it would run but for a size or a type, the reference is many times slower.
            log.warning("kernels: %s runs on torch: %s", op, "; ".join(passed))
        else:
            log.info("kernels: %s runs on %s%s", op, name, " (configured)" if wanted else "")
    return name
