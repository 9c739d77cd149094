"""What a step on a GPU would keep and hold, without a GPU: tensors on the meta device.

The Triton ops declare their outputs' shapes, so none of them is run. What an op allocates inside is
not seen.
"""

import sys
import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fulmen.models.text import Block, LossOutput, TextModel
from fulmen.parallel import checkpointing
from fulmen.trainer.config import RunConfig


def use_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops choose what they would choose on a GPU."""
    pytest.importorskip("triton")
    others = {"attention": "torch_varlen", "grouped_gemm": "grouped_mm"}

    def choose(op: str, *candidates: tuple[str, str]) -> str:
        return others.get(op, "triton")

    for name, module in list(sys.modules.items()):
        if name.startswith("fulmen.kernels.") and hasattr(module, "choose"):
            monkeypatch.setattr(module, "choose", choose)


def meta_model(config: RunConfig) -> TextModel:
    """The model in its compute type, with its activation checkpointing."""
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.trainer.dtype]
    with torch.device("meta"):
        model = TextModel(config.model, config.moe)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if ".gate." in name else dtype)
    checkpointing.checkpoint_activations(
        cast(list[Block], list(model.layers)),
        [],
        config.trainer.activation_checkpointing,
        chunk_tokens=config.trainer.chunk_tokens,
        offload=False,
        over_ranks=False,
        device=torch.device("meta"),
    )
    return model


def forward(model: TextModel, tokens: int) -> LossOutput:
    """On one row."""
    with torch.device("meta"):
        ids = torch.empty(1, tokens, dtype=torch.int64)
        bounds = torch.empty(3, dtype=torch.int32)
        output = model(ids, labels=ids, cu_seqlens=bounds, num_tokens=tokens)
    assert isinstance(output, LossOutput)
    return output


class LiveBytes(TorchDispatchMode):
    """Of the tensors that ops have put out and that somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = op(*args, **(kwargs or {}))
        for x in tree_iter(output):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self._alive:
                storage = x.untyped_storage()
                self._alive.add(storage._cdata)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return output

    def _drop(self, address: int, nbytes: int) -> None:
        self._alive.discard(address)
        self.now -= nbytes


class MovedBytes(TorchDispatchMode):
    """What ops of these names read and write, each input and each output once.

    Without what has more than so many dims, as attention has inside where it is no op of its own.
    """

    def __init__(self, names: set[str], *, most_dims: int = 4) -> None:
        super().__init__()
        self.total = 0
        self._names, self._most_dims = names, most_dims

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = op(*args, **(kwargs or {}))
        if op._schema.name.removeprefix("aten::") in self._names:
            tensors = [x for x in tree_iter((args, output)) if isinstance(x, Tensor)]
            self.total += sum(x.nbytes for x in tensors if x.dim() <= self._most_dims)
        return output
