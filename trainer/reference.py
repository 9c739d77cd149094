"""How likely the answers of pairs are to the weights that a preference stage starts from.

They are computed once, by all ranks, and kept in the run's folder: a file for each source and
split, written whole or not at all. No second model is held in memory.
"""

import os
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.data.packing import PackedBatch
from fulmen.data.shards import PreparedSplit
from fulmen.models.text import LossOutput, TextModel
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.config import RunConfig
from fulmen.trainer.evaluate import held_out_batches
from fulmen.trainer.inputs import model_inputs
from fulmen.trainer.run_log import log

KEY = "log_probabilities"


def pair_log_probabilities(
    model: TextModel, batch: PackedBatch, mesh: Mesh
) -> tuple[Tensor, LossOutput]:
    """`[pairs, 2]` of the chosen and the rejected answers of a micro-batch, and its losses."""
    output = model(**model_inputs(batch, mesh, model.config.vision), per_document=True)
    assert isinstance(output, LossOutput)
    documents = torch.tensor([[p.document, p.document + 1] for p in batch.pairs], dtype=torch.int64)
    if mesh.device.type != "cpu":
        documents = documents.pin_memory().to(mesh.device, non_blocking=True)
    return -output.loss_sum[documents.view(-1, 2)], output


@torch.no_grad()
def compute_reference(
    model: TextModel, split: PreparedSplit, mesh: Mesh, config: RunConfig
) -> Tensor:
    """`[documents, 2]` fp32 log-probabilities of all pairs of a split, on the host.

    All ranks call it and share the pairs. A pair's values do not depend on its neighbours: the
    experts of an evaluating model have no capacity.
    """
    size = split.num_documents
    found = torch.zeros(size, 2, device=mesh.device)
    times = torch.zeros(size, dtype=torch.int64, device=mesh.device)
    model.eval()
    for batch in held_out_batches(
        split, mesh, config, max_tokens=split.num_tokens, doing="reference"
    ):
        values, _ = pair_log_probabilities(model, batch, mesh)
        numbers = torch.tensor(
            [pair.number for pair in batch.pairs], dtype=torch.int64, device=mesh.device
        )
        found[numbers] = values.float()
        times[numbers] += 1
    model.train()
    # Each pair is on one rank, and 0 on the others: the sums are its values, bit for bit.
    dist.all_reduce(found)
    dist.all_reduce(times)
    assert bool((times == 1).all()), "each pair once"
    if not bool(found.isfinite().all()):
        first = int((~found.isfinite().all(1)).nonzero()[0])
        raise FloatingPointError(
            f"data.sources.{split.name}: a log-probability of pair {first} of {split.path} "
            f"({split.split}) is not finite under the weights that the stage starts from"
        )
    return found.cpu()


def find_reference(
    model: TextModel,
    split: PreparedSplit,
    mesh: Mesh,
    config: RunConfig,
    *,
    folder: Path,
    start: str,
    may_compute: bool,
) -> Tensor:
    """The values of `compute_reference` by the weights `start`: stored ones, or else computed.

    All ranks call it. Without `may_compute` the model has moved on from `start`, and `ValueError`
    says that the file has to be there.
    """
    file = folder / f"{split.name}-{split.split}.safetensors"
    held = {"start": start, "data": split.fingerprint}
    stored: list[Tensor | None] = [_read(file, held) if mesh.rank == 0 else None]
    dist.broadcast_object_list(stored, src=0)
    if stored[0] is not None:
        return stored[0]
    if not may_compute:
        raise ValueError(
            f"{file} is missing, or not of this stage's first weights and data: the run goes on "
            "within the stage and cannot compute it any more. Copy it back, or begin the stage "
            "anew from the checkpoint before it"
        )
    started = time.perf_counter()
    log.info("reference: %d pairs of %s, %s", split.num_documents, split.name, split.split)
    values = compute_reference(model, split, mesh, config)
    failure: list[str | None] = [None]
    if mesh.rank == 0:
        try:
            _write(file, values, held)
        except OSError as error:
            failure = [f"{file} cannot be written: {error.strerror}"]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])
    log.info("reference: %s, in %.1f s", file, time.perf_counter() - started)
    return values


def _read(file: Path, held: dict[str, str]) -> Tensor | None:
    """What a file has, if it is there and of these weights and data."""
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            return stored.get_tensor(KEY) if stored.metadata() == held else None
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("%s cannot be read: %s", file, error)
        return None


def _write(file: Path, values: Tensor, held: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    with draft.open("wb") as stream:
        stream.write(safetensors.torch.save({KEY: values.contiguous()}, held))
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
