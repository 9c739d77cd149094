"""From a micro-batch to the arguments of the model, on this rank's device."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fulmen.data.packing import PackedBatch
from fulmen.models.layers import packed_positions
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.sequence import RowPart


def model_inputs(batch: PackedBatch, mesh: Mesh) -> dict[str, Any]:
    """Arguments of `TextModel.forward` for this rank's part of a micro-batch."""
    inputs: dict[str, Any] = {"num_tokens": batch.num_tokens}
    ids, labels, cu_seqlens = batch.input_ids, batch.labels, batch.cu_seqlens
    if mesh.cp > 1:
        tokens = ids.shape[1] // mesh.cp
        part = RowPart(mesh.cp_rank, mesh.cp, tokens, tuple(cu_seqlens.tolist()))
        here = slice(part.first, part.first + tokens)
        positions = packed_positions(ids.shape[1], cu_seqlens, ids.device)[here]
        ids, labels = ids[:, here].contiguous(), labels[:, here].contiguous()
        cu_seqlens = torch.tensor([0, *accumulate(part.lengths)], dtype=torch.int32)
        inputs["num_tokens"] = min(max(batch.num_tokens - part.first, 0), tokens)
        inputs |= {"positions": _to_device(positions, mesh.device), "row_part": part}
    return inputs | {
        "input_ids": _to_device(ids, mesh.device),
        "labels": _to_device(labels, mesh.device),
        "cu_seqlens": _to_device(cu_seqlens, mesh.device),
        "document_lengths": cu_seqlens.diff().tolist(),
    }


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
