"""Bad steps: skipped, and beyond a limit the run goes back to an earlier checkpoint.

A step is judged between its gradient and its update, by the gradient's norm and the loss, both
summed over all ranks in one reduction: every rank sees the same numbers and decides alike. A step
that is not finite or a spike updates nothing; its data and tokens count as drawn. The device itself
decides, by limits from the steps before, and the host reads it behind the launch of the update.

More than `health.max_skips` of them in a window, and weights, moments and counts of updates are
taken from the newest checkpoint that is older than the first of them. Steps, tokens and data go on
from where they are: what was drawn in between is not drawn again.

All that a decision depends on is in the checkpoint, so a run that was killed decides the same
again. Checkpoints written between the first bad step and the way back are still good to go on from
after a failure, for the run then goes back where it did; but none is ever gone back to, and the
one to go back to is kept meanwhile, whatever `checkpoint.keep` is.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fulmen.parallel.progress import phase
from fulmen.parallel.replicas import find_difference, replicated
from fulmen.parallel.zero import ZeroEngine
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.health_config import HealthConfig
from fulmen.trainer.optim import Optimizer
from fulmen.trainer.restore import restore, trained_tensors
from fulmen.trainer.run_log import log
from fulmen.trainer.spikes import LEAST, highest_loss, highest_norm


class HealthError(RuntimeError):
    """The run cannot go on by itself; the message says what to do."""


class Health:
    """Of one stage, on every rank.

    `state` is a former `state()` and `first_step` the steps before the stage. Where `step` is that
    one, the state is the stage's before: only what is about the whole run is taken from it.
    """

    def __init__(
        self,
        config: HealthConfig,
        engine: ZeroEngine,
        optimizer: Optimizer,
        checkpointer: Checkpointer,
        *,
        step: int,
        first_step: int,
        state: Mapping[str, Any],
    ) -> None:
        self._config, self._engine, self._optimizer = config, engine, optimizer
        self._checkpointer, self._first_step = checkpointer, first_step
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._bad: list[int] = []
        """Bad steps of the last window, since the last way back."""
        self._rewinds: int = state.get("rewinds", 0)
        self._left: list[tuple[int, int]] = [(a, b) for a, b in state.get("left", [])]
        """Steps (from, to) of each way back: checkpoints in between are of what was given up."""
        if step > first_step:
            self._remember(state)
            self._bad = list(state.get("bad", []))
        self._is_bad = False
        self._seen = torch.zeros(3)
        """Norm, loss and flag of the step, on the host once `_arrived`."""
        self._arrived: torch.cuda.Event | None = None
        self._reason: str | None = None
        """Why the run has to go back now."""
        self._limit = 0
        """To a checkpoint of a step below this."""
        self._compared: int | None = None
        self._news: list[str] = []
        self._replicated = replicated(trained_tensors(engine, optimizer))
        if config.enabled:
            self._announce()

    def flag(self, grad_norm: Tensor, loss: Tensor) -> Tensor | None:
        """Whether the step must update nothing, a scalar on the device; None = not judged.

        The norm is that of `ZeroEngine.clip_grad_norm`, before clipping; the loss what went
        backward, over all ranks. Does not wait for the device.
        """
        if not self._config.enabled:
            return None
        norm, loss = grad_norm.double(), loss.double()
        most_norm, most_loss = self._limits()
        bad = ~(torch.isfinite(norm + loss) & (norm <= most_norm) & (loss <= most_loss))
        seen = torch.stack([norm, loss, bad.double()])
        self._seen = seen
        if seen.is_cuda:
            self._seen = torch.empty(3, dtype=seen.dtype, pin_memory=True)  # of a pool
            self._seen.copy_(seen, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return bad

    def judge(self, step: int, digest: str) -> None:
        """Learn what `flag` said of the step of this number; waits for its gradients.

        By then the device has the update to make, so it is not kept waiting. `digest` names the
        batch in the log.
        """
        config = self._config
        if not config.enabled:
            return
        phase("judgement")
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, loss, bad = self._seen.tolist()
        fault = self._fault(norm, loss) if bad else None
        self._bad = [one for one in self._bad if one > step - config.window]
        self._is_bad = fault is not None
        if fault is None:
            self._norms.append(norm)
            self._losses.append(loss)
            return
        self._optimizer.uncount()
        self._bad.append(step)
        count = f"{len(self._bad)} of the last {config.window} steps, {config.max_skips} may be"
        self._tell(f"skipped: {fault}; batch {digest}; {count}", step)
        if len(self._bad) > config.max_skips:
            self._reason = (
                f"{len(self._bad)} bad steps since step {self._bad[0]}, more than "
                f"health.max_skips={config.max_skips}"
            )
            self._limit = self._bad[0]

    def compare_replicas(self, step: int, host: Mapping[str, Any]) -> None:
        """Whether all ranks have the same bits where they should, once after a step.

        `host` is JSON-able, what the host has to know alike on all ranks. `HealthError` naming
        ranks and tensor where they differ, or the run has to go back.
        """
        if not self._config.enabled or self._compared == step:
            return
        self._compared = step
        phase("replicas")
        text = json.dumps(host, sort_keys=True).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1
        fault = find_difference(self._replicated, digest, self._engine)
        if fault is None:
            return
        fault = f"replicas are not the same after step {step}: {fault}"
        if self._config.on_disagreement == "stop":
            raise HealthError(
                f"{fault}. A GPU, its memory or a link may be broken: look at these ranks' nodes. "
                "The newest checkpoint is from before it"
            )
        if self._reason is None:  # else what is gone back to is older
            self._reason, self._limit = fault, step

    @property
    def goes_back(self) -> bool:
        """Whether `rewind` has to be called before the next step."""
        return self._reason is not None

    def rewind(self, step: int) -> None:
        """Take weights, moments and counts of updates from the checkpoint to go back to."""
        reason, self._reason = self._reason, None
        assert reason is not None
        phase("way back")
        config, before = self._config, self._limit
        if self._rewinds >= config.max_rewinds:
            raise HealthError(
                f"{reason} (step {step}), and the run has gone back {self._rewinds} times, which "
                "is health.max_rewinds: find the cause (docs/operations.md, Health), then go on "
                "with other values of health.* or optim.lr"
            )
        self._checkpointer.settle()
        path = self._checkpointer.find_newest(self._usable(before))
        if path is None:
            raise HealthError(
                f"{reason} (step {step}), and there is no checkpoint of this stage from before "
                f"step {before} to go back to: save earlier (checkpoint.every_steps), or raise "
                "health.max_skips"
            )
        state = restore(self._checkpointer, path, self._engine, self._optimizer, {})
        self._norms.clear()
        self._losses.clear()
        if state["step"] > self._first_step:
            self._remember(state.get("health", {}))
        self._bad = []
        self._rewinds += 1
        self._left.append((state["step"], step))
        lost = step - state["step"]
        self._tell(f"{reason}; back to {path.name}, {lost} steps of training are lost", step)

    @property
    def kept(self) -> Callable[[int], bool] | None:
        """Which steps' checkpoints are needed, the newest of them, or None."""
        return self._usable(self._bad[0]) if self._bad else None

    def check_finite(self, step: int, grad_norm: Tensor) -> None:
        """Where steps are not judged: stop the run. Waits for the device."""
        # The optimiser has already put it into every weight; what was saved before is still good.
        if not self._config.enabled and not torch.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm of step {step} is {grad_norm.item()}: the run stops, and "
                "the last checkpoint is from before it"
            )

    @property
    def has_news(self) -> bool:
        """Whether the step has something to tell in a row of its own."""
        return bool(self._news)

    def row(self) -> dict[str, Any]:
        """What the step's row says; news are told once."""
        if not self._config.enabled:
            return {}
        news, self._news = "; ".join(self._news), []
        told = {"health": news} if news else {}
        return {"skipped": int(self._is_bad), "rewinds": self._rewinds, **told}

    def state(self) -> dict[str, Any]:
        """JSON-able, the same on all ranks: what a checkpoint keeps."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "bad": self._bad,
            "rewinds": self._rewinds,
            "left": self._left,
        }

    def _remember(self, state: Mapping[str, Any]) -> None:
        self._norms.extend(state.get("norms", []))
        self._losses.extend(state.get("losses", []))

    def _limits(self) -> tuple[float, float]:
        """Of the norm and of the loss."""
        factor = self._config.spike_factor
        if factor is None or len(self._norms) < min(LEAST, self._config.window):
            return math.inf, math.inf
        return highest_norm(self._norms, factor), highest_loss(self._losses, factor)

    def _fault(self, norm: float, loss: float) -> str:
        most_norm, most_loss = self._limits()
        name, value, limit = "loss", loss, most_loss
        if not (math.isfinite(norm) and norm <= most_norm):
            name, value, limit = "gradient norm", norm, most_norm
        if not math.isfinite(value):
            return f"its {name} is {value}"
        seen = f"the limit that the last {len(self._norms)} good steps set"
        return f"its {name} is {value:.4g}, above {limit:.4g}, {seen}"

    def _usable(self, before: int) -> Callable[[int], bool]:
        first, left = self._first_step, list(self._left)
        return lambda step: (
            first <= step < before and not any(start < step < end for start, end in left)
        )

    def _tell(self, text: str, step: int) -> None:
        log.warning("step %d: %s", step, text)
        self._news.append(text)

    def _announce(self) -> None:
        every = self._config.replicas_every_steps
        log.info(
            "replicas are compared %s: the weights that ranks gather, and %d weights and moments "
            "that more than one of them keeps",
            "before each save" if every is None else f"every {every} steps and before each save",
            len(self._replicated),
        )
