"""What a stage minimises: the loop knows steps and micro-batches, an objective what they mean."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.data.loader import StepBatch
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit, read_manifest
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.evaluate import evaluate
from fulmen.trainer.inputs import model_inputs, token_sources
from fulmen.trainer.metrics import LOSS_PREFIX
from fulmen.trainer.step_stats import StepStats


class Objective(ABC):
    """Loss of a micro-batch, what a step's row says of it, and held-out values.

    One is made for each stage, on every rank, and `prepare`d before the stage's steps. A step calls
    `begin_step`, then `loss` for each of this rank's micro-batches, and `read_step` where the step
    is logged. Gradients are summed over micro-batches and ranks, nowhere averaged
    (parallel/zero.py): so what `loss` gives is the micro-batch's part of the whole step's loss,
    divided by global counts such as `StepBatch.num_labels`, which hold for all ranks and need no
    exchange.

    A new one is a subclass here or in a file of its own, a name in `config.OBJECTIVES`, and a line
    in `loop.OBJECTIVES`.
    """

    _stats: StepStats
    """Of the step, where there are experts."""

    def __init__(
        self,
        config: RunConfig,
        model: TextModel,
        mesh: Mesh,
        train: Sequence[PreparedSplit],
        held_out: Mapping[str, PreparedSplit],
    ) -> None:
        """`config` is the stage's, `train` the sources that it can draw.

        `held_out` are the held-out splits of all sources, or none if nothing is evaluated.
        """
        self.config, self.model, self.mesh = config, model, mesh
        self.train, self.held_out = train, held_out

    @classmethod  # noqa: B027
    def check_sources(
        cls, train: Sequence[PreparedSplit], held_out: Mapping[str, PreparedSplit]
    ) -> None:
        """`ValueError`, naming the key, for sources of a stage that the objective cannot use.

        Called at the start of a run, for all of its stages.
        """

    def prepare(self, folder: Path, start: str) -> None:  # noqa: B027  most have nothing to do
        """Do what has to be done before the stage's first step, or find that it was done.

        All ranks call it, also where the run goes on within the stage, then after `load_state`.
        `folder` is where the stage may keep files; `start` names the weights that the model has.
        """

    @abstractmethod
    def begin_step(self, batch: StepBatch) -> None:
        """The next step is this one; sums of the one before are let go. No exchange."""

    @abstractmethod
    def loss(self, micro_batch: PackedBatch) -> Tensor:
        """Forward pass: the part of the step's loss that goes backward. Does not wait for the
        device."""

    @abstractmethod
    def read_step(self) -> dict[str, Any]:
        """What the step's row says, over all ranks, which all call it; waits for the device.

        Has at least `loss`, `drop_rate` and `expert_imbalance`; numbers, but for `expert_load`, a
        tensor (layers, experts) on the CPU, where there are experts.
        """

    @property
    def num_dropped(self) -> Tensor:
        """Expert assignments that this rank has dropped in the step so far, on the device."""
        return self._stats.num_dropped

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Values on held-out documents by `METRIC/SOURCE`, the same on all ranks, which call it.

        They are logged as `eval_METRIC/SOURCE`.
        """

    def watch(self, step: int, values: Mapping[str, float]) -> None:  # noqa: B027
        """Take what the regular evaluation after a step gave: it may be a reason to end."""

    @property
    def finished(self) -> bool:
        """Whether the stage, which then is the run's last, ends before its tokens are trained."""
        return False

    def state(self) -> dict[str, Any]:
        """JSON-able, the same on all ranks: what a checkpoint keeps for `load_state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on within a stage, from a former `state()`."""


def count_pairs(split: PreparedSplit) -> int:
    """Documents of a split that are pairs of answers, by its folder's manifest."""
    return int(read_manifest(split.path)["splits"][split.split].get("pairs", 0))


class LanguageModelling(Objective):
    """Cross entropy of the next token, a mean over all labels of a step."""

    @classmethod
    def check_sources(
        cls, train: Sequence[PreparedSplit], held_out: Mapping[str, PreparedSplit]
    ) -> None:
        for split in train:
            if count_pairs(split):
                raise ValueError(
                    f"data.sources.{split.name}: {split.path} has pairs of answers, and "
                    "objective=language_modelling would learn the rejected ones too: set "
                    "objective=preference, or give the source no share of the stage"
                )

    def begin_step(self, batch: StepBatch) -> None:
        self._num_labels = max(1, batch.num_labels)  # documents of one token have none
        # Of a run's only source it would be the loss again.
        self._labels = {
            f"{LOSS_PREFIX}{source}": (number, count)
            for number, (source, count) in enumerate(batch.labels.items())
            if count and len(batch.labels) > 1
        }
        self._stats = StepStats(
            self.config,
            self.mesh,
            num_micro_batches=len(batch.micro_batches),
            names=("loss", *self._labels),
        )

    def loss(self, micro_batch: PackedBatch) -> Tensor:
        output = self.model(**model_inputs(micro_batch, self.mesh, self.config.model.vision))
        assert isinstance(output, LossOutput)
        self._stats.add(output, loss=output.loss_sum, **self._by_source(micro_batch, output))
        return output.loss_sum / self._num_labels + self._stats.weigh_aux_loss(output)

    def read_step(self) -> dict[str, Any]:
        reduced = self._stats.reduce()
        by_source = {name: reduced.sums[name] / count for name, (_, count) in self._labels.items()}
        return {"loss": reduced.sums["loss"] / self._num_labels, **by_source, **reduced.of_routers}

    def evaluate(self) -> dict[str, float]:
        losses = evaluate(self.model, self.held_out, self.mesh, self.config)
        return {f"loss/{source}": loss for source, loss in losses.items()}

    @torch.no_grad()
    def _by_source(self, micro_batch: PackedBatch, output: LossOutput) -> dict[str, Tensor]:
        """Sums of this rank's losses, for each source that the step has anywhere."""
        if not self._labels:
            return {}
        losses, sources = output.token_losses, token_sources(micro_batch, self.mesh)
        assert losses is not None
        # One after the other: sums in a fixed order, and none of them needs much memory.
        return {
            name: losses.where(sources == number, 0.0).sum(dtype=torch.float64)
            for name, (number, _) in self._labels.items()
        }
