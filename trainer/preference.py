"""Direct preference optimisation (DPO, arXiv:2305.18290) as a stage's objective."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.data.loader import StepBatch
from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.models.preference import PreferenceLoss, preference_loss
from fulmen.models.text import LossOutput
from fulmen.trainer.evaluate import held_out_batches
from fulmen.trainer.objective import Objective, count_pairs
from fulmen.trainer.reference import find_reference, pair_log_probabilities
from fulmen.trainer.run_log import log
from fulmen.trainer.step_stats import StepStats

LOSS = "dpo_loss/"
"""Beginning of the names of held-out losses."""


class Preference(Objective):
    """The mean of `preference_loss` over all pairs of a step.

    The reference is the model that the stage starts from, by its stored log-probabilities. The
    stage can end early: after `preference.patience` evaluations in turn without a lower held-out
    loss, which is the mean over its sources.
    """

    _start: str | None = None
    """The weights that the stage began with."""
    _lowest: float | None = None
    """Held-out loss, of all regular evaluations."""
    _lowest_step = 0
    _in_vain = 0
    """Evaluations since then."""

    @classmethod
    def check_sources(
        cls, train: Sequence[PreparedSplit], held_out: Mapping[str, PreparedSplit]
    ) -> None:
        for split in chain(train, (held_out[one.name] for one in train if held_out)):
            others = split.num_documents - count_pairs(split)
            if others:
                raise ValueError(
                    f"data.sources.{split.name}: objective=preference needs pairs, and {others} of "
                    f"{split.num_documents} documents of {split.path} ({split.split}) are none: "
                    "prepare the source from prompt, chosen and rejected (docs/images.md), or give "
                    "it no share of the stage"
                )

    def prepare(self, folder: Path, start: str) -> None:
        is_first, self._start = self._start is None, self._start or start
        held_out = [self.held_out[split.name] for split in self.train if self.held_out]
        self._reference = {
            (split.name, split.split): find_reference(
                self.model,
                split,
                self.mesh,
                self.config,
                folder=folder,
                start=self._start,
                may_compute=is_first,
            )
            for split in [*self.train, *held_out]
        }

    def begin_step(self, batch: StepBatch) -> None:
        self._num_pairs = batch.num_pairs
        self._stats = StepStats(
            self.config,
            self.mesh,
            num_micro_batches=len(batch.micro_batches),
            names=PreferenceLoss._fields,
        )

    def loss(self, micro_batch: PackedBatch) -> Tensor:
        found, output = self._forward(micro_batch, "train")
        self._stats.add(output, **found._asdict())
        return found.loss / self._num_pairs + self._stats.weigh_aux_loss(output)

    def read_step(self) -> dict[str, Any]:
        reduced = self._stats.reduce()
        means = {name: value / self._num_pairs for name, value in reduced.sums.items()}
        return means | {"num_pairs": self._num_pairs} | reduced.of_routers

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        means: dict[str, dict[str, float]] = {}
        for split in (self.held_out[one.name] for one in self.train):
            sums = torch.zeros(len(PreferenceLoss._fields) + 1, dtype=torch.float64)
            sums = sums.to(self.mesh.device)
            for batch in held_out_batches(split, self.mesh, self.config):
                found, _ = self._forward(batch, "valid")
                sums[:-1] += torch.stack([value.double() for value in found])
                sums[-1] += len(batch.pairs)
            dist.all_reduce(sums)
            dist.broadcast(sums, src=0)  # to the last bit: all ranks have to end together
            *totals, num_pairs = sums.tolist()
            means[split.name] = {
                name: total / num_pairs
                for name, total in zip(PreferenceLoss._fields, totals, strict=True)
            }
        self.model.train()
        return {
            f"{LOSS if name == 'loss' else name + '/'}{source}": values[name]
            for name in PreferenceLoss._fields
            for source, values in means.items()
        }

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        settings = self.config.preference
        losses = [value for name, value in values.items() if name.startswith(LOSS)]
        loss = sum(losses) / len(losses)
        if self._lowest is None or loss < self._lowest - settings.min_improvement:
            self._lowest, self._lowest_step, self._in_vain = loss, step, 0
            return
        self._in_vain += 1
        if self.finished:
            log.info(
                "the stage ends early, at step %d, with a held-out loss of %.4f: after the %.4f of "
                "step %d, %d evaluations in turn were not lower (preference.patience)",
                step,
                loss,
                self._lowest,
                self._lowest_step,
                self._in_vain,
            )

    @property
    def finished(self) -> bool:
        patience = self.config.preference.patience
        return patience is not None and self._in_vain >= patience

    def state(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "lowest": self._lowest,
            "lowest_step": self._lowest_step,
            "in_vain": self._in_vain,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._start = state["start"]
        self._lowest, self._lowest_step = state["lowest"], state["lowest_step"]
        self._in_vain = state["in_vain"]

    def _forward(self, batch: PackedBatch, split: str) -> tuple[PreferenceLoss, LossOutput]:
        policy, output = pair_log_probabilities(self.model, batch, self.mesh)
        reference = torch.zeros(len(batch.pairs), 2)
        for place, pair in enumerate(batch.pairs):
            reference[place] = self._reference[pair.source, split][pair.number]
        if self.mesh.device.type != "cpu":
            reference = reference.pin_memory().to(self.mesh.device, non_blocking=True)
        return preference_loss(policy, reference, beta=self.config.preference.beta), output
