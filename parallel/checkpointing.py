"""What a block keeps for its backward pass: policies, chunks of tokens, and host memory.

| `trainer.activation_checkpointing` | kept of a block                                       |
|------------------------------------|-------------------------------------------------------|
| none                               | what every op's backward pass reads                   |
| selective                          | what matrix products and attention's cores put out;   |
|                                    | norms, SiLU, RoPE, gate and the router's fp32 copy    |
|                                    | are computed again                                    |
| full                               | its input; all of it is computed again                |

`trainer.chunk_tokens` lets tokens pass through all but attention's core in chunks, each computed
again backward (models/chunks.py). With it `full` leaves the expert sublayer, which then keeps no
more than its input, out of its second pass, and keeps the output of softmax attention, whose cost
grows with the square of the length; over cp ranks its inputs too, for there it is no torch op.

The blocks of a vision tower follow the same policy: `selective` computes their norms and GELU
again. Chunks do not concern them; tiles are short rows.

`trainer.offload_checkpoints` keeps the inputs that `full` keeps in pinned host memory. They leave
by a stream of their own while the half of a block that made them goes on, and come back while the
half behind it is in its backward pass.

Second passes repeat what they contain in the same order on every rank, exchanges too, and routing
is decided once: the expert sublayer is repeated as a whole (full), from its routing on (chunks), or
not at all (selective). The model draws no random numbers, so there is no generator to restore.
docs/memory.md counts what each policy costs.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fulmen.models.softmax import SoftmaxAttention
from fulmen.models.text import Block
from fulmen.models.vision import VisionBlock
from fulmen.parallel.offload import HostMemory, Kept, keep_here

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def checkpoint_activations(
    blocks: Sequence[Block],
    tower: Iterable[VisionBlock],
    policy: str,
    *,
    chunk_tokens: int | None,
    offload: bool,
    over_ranks: bool,
    device: torch.device,
) -> None:
    """Let the blocks of a model keep what `policy` says; the keys are checked in the config.

    `tower` are those of a vision tower. `over_ranks` says whether ranks share rows.
    """
    host = HostMemory(device) if offload else None
    for seeing in tower:
        if policy == "selective":
            _repeat(seeing, "forward", None, _is_costly)
        elif policy == "full":
            _repeat(seeing, "forward", host)
    for block in blocks:
        if chunk_tokens is not None:
            block.chunk_tokens = chunk_tokens
            block.block_sparse_moe.gate.chunk_tokens = chunk_tokens
            block.block_sparse_moe.experts.chunk_tokens = chunk_tokens
        if policy == "selective":
            _repeat(block, "mix_tokens", None, _is_costly)
            _repeat(block.block_sparse_moe.gate, "forward", None)
        elif policy == "full" and chunk_tokens is None:
            _repeat(block, "forward", host)
        elif policy == "full":
            softmax = isinstance(block.self_attn, SoftmaxAttention)
            if not softmax or not over_ranks:
                _repeat(block, "mix_tokens", host, _is_softmax_core if softmax else None)
            elif host is not None:
                _keep_input(block, "mix_tokens", host)
            if host is not None:
                _keep_input(block, "mix_channels", host)


def _repeat(
    module: Any, method: str, host: HostMemory | None, keeps: Callable[[Any], bool] | None = None
) -> None:
    """Let a method keep its first argument and compute the rest again, but outputs of some ops."""
    function = getattr(module, method)
    options: dict[str, Any] = {}
    if keeps is not None:
        policy = partial(_policy, keeps)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def from_kept(kept: Kept, *others: Any) -> Any:
        return function(kept.get(), *others)

    def repeated(x: Tensor, *others: Any) -> Any:
        kept = keep_here(x) if host is None or not torch.is_grad_enabled() else host.keep(x)
        output = checkpoint(
            from_kept, kept, *others, use_reentrant=False, preserve_rng_state=False, **options
        )
        kept.leave()
        return output

    setattr(module, method, repeated)


def _keep_input(block: Block, method: str, host: HostMemory) -> None:
    """Let what a method saves of its first argument itself lie in host memory."""
    function = getattr(block, method)

    def kept_on_host(x: Tensor, *others: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(x, *others)
        with _saving(host.keep(x), x):
            return function(x, *others)

    setattr(block, method, kept_on_host)


def _saving(kept: Kept, x: Tensor) -> AbstractContextManager[None]:
    storage = x.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Tensor | tuple[Any, ...]:
        if saved.untyped_storage().data_ptr() != storage or not storage:
            return saved
        kept.leave()
        return kept, saved.shape, saved.stride(), saved.storage_offset() - x.storage_offset()

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, shape, stride, offset = packed
        values = kept.get().detach()
        return values.as_strided(shape, stride, values.storage_offset() + offset)

    hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    return hooks


def _policy(
    keeps: Callable[[Any], bool],
    context: SelectiveCheckpointContext,
    op: Any,
    *_: Any,
    **__: Any,
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_costly(op: Any) -> bool:
    """Matrix products, and the cores of attention as far as they are torch ops.

    What is put together of several of them outside of autograd, as over cp ranks, is not: there an
    output may be changed in place. It is repeated.
    """
    space, name = op._schema.name.split("::")
    if space == "aten" and not torch.is_grad_enabled():
        return False
    return name in _PRODUCTS or "attn" in name or "attention" in name


def _is_softmax_core(op: Any) -> bool:
    return _is_costly(op) and op._schema.name.split("::")[-1] not in _PRODUCTS
