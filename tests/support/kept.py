"""What a forward pass keeps for its backward pass, wherever autograd or checkpoints keep it."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fulmen.parallel import checkpointing


class KeptBytes:
    """Made before checkpoints are put into a model; a forward pass runs in `watch()`."""

    def __init__(
        self,
        model: nn.Module,
        monkeypatch: pytest.MonkeyPatch,
        counts: Callable[[Tensor], bool] = lambda x: True,
    ) -> None:
        """Tensors that `counts` refuses are left out, and the model's parameters."""
        self._sizes: dict[int, int] = {}
        self._alive: list[Any] = []
        self._counts = counts
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._plain_policy = checkpointing._policy
        monkeypatch.setattr(checkpointing, "_policy", self._policy)
        monkeypatch.setattr(checkpointing, "keep_here", self._keep_here)

    @property
    def total(self) -> int:
        """Bytes, each storage once."""
        return sum(self._sizes.values())

    def watch(self) -> saved_tensors_hooks:
        """A context in which all that is kept is counted."""
        return saved_tensors_hooks(self._count, lambda x: x)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._alive.append(storage)  # so that no address comes twice
        if storage._cdata not in self._own and self._counts(x):
            self._sizes[storage._cdata] = storage.nbytes()
        return x

    def _keep_here(self, x: Tensor) -> checkpointing.Kept:
        return checkpointing.Kept(self._count(x))

    def _policy(self, keeps: Any, context: Any, op: Any, *args: Any, **options: Any) -> Any:
        if keeps(op):
            output = op(*args, **options)
            for kept in output if isinstance(output, tuple) else (output,):
                if isinstance(kept, Tensor) and kept.numel():
                    self._count(kept)
        return self._plain_policy(keeps, context, op, *args, **options)
