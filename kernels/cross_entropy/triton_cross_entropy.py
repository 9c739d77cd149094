"""Head and cross entropy on a GPU: torch's matrix products, and one Triton kernel between them.

A visit of C tokens: logits = hidden @ weight^T; the kernel turns logits into their gradient in
place and sums the loss; grad_hidden = grad @ weight; grad_weight += grad^T @ hidden. 6 C H V
operations, of which none is repeated.

Memory. grad_weight (2.29 GiB in bf16 at Text-01's 200,064 x 6144) must exist anyway, so the first
visit, of up to H tokens, keeps its logits *in it*: a slab of the vocabulary has as many logits
(H tokens) as gradients (H numbers a row). Block s of the logits lies where the gradient of slab
s - 1 will be, block 0 in a spare slab; going from the last slab to the first, each gradient
overwrites a block that has been used. What H tokens leave over goes through a scratch of
CHUNK_BYTES. Few visits matter: each of them reads and writes all of grad_weight.

Rounding. grad_weight is kept in the weight's type and rounded once a visit: for bf16 and 8192
tokens 2.7e-3 of its norm (three visits; one rounding is 1.7e-3, 32 visits 6.0e-3; 20 visits, which
32,768 tokens take, 5.6e-3). Longer rows, of up to hundreds of visits, add it to an fp32 sum every
SUMMED_CHUNKS visits. grad_hidden is summed over slabs in fp32 and rounded once.
"""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.kernels.cross_entropy.reference import IGNORE_INDEX

CHUNK_BYTES = 544 * 2**20
"""Logits of a visit outside grad_weight: 1408 tokens of 200,064 bf16 logits, whose grad_hidden is
two full waves of 128 x 256 tiles on 132 multiprocessors (1408 / 128 * 6144 / 256 = 264)."""
ROW_MULTIPLE = 128
"""Tokens, for full tiles of the matrix products."""
SUMMED_CHUNKS = 32
"""Visits that are summed in the weight's type."""
NUM_SLABS = 8
"""At most. The spare block is one slab; grad_hidden is added to once a slab."""
TILE = 8192
"""Logits that a program takes at a time, in two rows: 16 per thread, 16 KiB in bf16."""
NUM_WARPS = 16
NUM_STAGES = 3
SCALE_BLOCK = 4096


@triton.jit
def address_of(first, others, column, slab, stride):
    """Where a row's logit lies: blocks of `slab` columns, the first apart from the others."""
    block = column // slab
    rest = others + (block - 1).to(tl.int64) * stride
    return tl.where(block == 0, first, rest) + (column - block * slab)


@triton.jit
def cross_entropy_kernel(
    first,
    others,
    labels,
    losses,
    vocab,
    slab,
    stride,
    z_loss,
    GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row: its loss, and its logits replaced by their gradient.

    A row of `first`, and of each block of `others`, is `slab` numbers long; blocks of `others` are
    `stride` numbers apart. Where there are several blocks, TILE divides `slab`.
    """
    row = tl.program_id(0).to(tl.int64)
    first += row * slab
    others += row * slab
    # Two rows, so that maximum and sum are taken over rows without talk between threads.
    column = tl.arange(0, 2)[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    tiles = tl.cdiv(vocab, TILE)
    label = tl.load(labels + row)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for tile in range(tiles):
                place = address_of(first, others, tile * TILE, slab, stride) + column
                zero = tl.zeros((2, TILE // 2), first.dtype.element_ty)
                tl.store(place, zero, mask=tile * TILE + column < vocab)
    else:
        target = tl.minimum(tl.maximum(label, 0), vocab - 1).to(tl.int32)
        picked = tl.load(address_of(first, others, target, slab, stride)).to(tl.float32)
        # Finite, so that a lane without a logit stays free of inf - inf.
        maxima = tl.full((TILE // 2,), -1e38, tl.float32)
        sums = tl.zeros((TILE // 2,), tl.float32)
        for tile in tl.range(tiles, num_stages=STAGES):
            place = address_of(first, others, tile * TILE, slab, stride) + column
            inside = tile * TILE + column < vocab
            x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(maxima, tl.max(x, axis=0))
            sums = sums * tl.exp(maxima - larger) + tl.sum(tl.exp(x - larger[None, :]), axis=0)
            maxima = larger
        maximum = tl.max(maxima, axis=0)
        total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
        log_total = tl.log(total)
        log_z = maximum + log_total
        loss = (maximum - picked) + log_total + z_loss * log_z * log_z
        tl.store(losses + row, tl.where(target == label, loss, float("nan")))
        if GRADIENT:
            # The label's logit has been read by all before one of them overwrites it.
            tl.debug_barrier()
            factor = (1 + 2 * z_loss * log_z) / total
            # Backwards: the row's end is still in the L2 cache.
            for step in tl.range(tiles, num_stages=STAGES):
                start = (tiles - 1 - step) * TILE
                place = address_of(first, others, start, slab, stride) + column
                inside = start + column < vocab
                x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
                grad = tl.exp(x - maximum) * factor
                grad = tl.where(start + column == target, grad - 1, grad)
                tl.store(place, grad.to(first.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(x, scale, numel, BLOCK: tl.constexpr):
    """`x *= scale` in fp32; nothing is touched where the scale is 1."""
    factor = tl.load(scale)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < numel
        value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(x + index, value.to(x.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one visit, and how many columns a block of their logits has."""

    start: int
    stop: int
    slab: int


def plan_chunks(
    tokens: int, hidden_size: int, vocab: int, *, element_size: int, need_weight: bool
) -> list[Chunk]:
    """The visits in order; only the first may have several blocks, the rest of them in grad_weight.

    From sizes alone. A row of blocks starts at a multiple of 16 numbers, whatever the vocabulary.
    """
    rows = CHUNK_BYTES // (vocab * element_size) // ROW_MULTIPLE * ROW_MULTIPLE
    rows = max(rows, ROW_MULTIPLE)
    slab = triton.cdiv(triton.cdiv(vocab, NUM_SLABS), TILE) * TILE
    inside = min(tokens, hidden_size) if need_weight and slab < vocab else 0
    chunks = []
    if inside > rows:
        chunks.append(Chunk(0, inside, slab))
    pitch = triton.cdiv(vocab, 16) * 16
    for start in range(chunks[-1].stop if chunks else 0, tokens, rows):
        chunks.append(Chunk(start, min(start + rows, tokens), pitch))
    return chunks


def _blocks(chunk: Chunk, weight: Tensor, grad_weight: Tensor) -> list[tuple[slice, Tensor]]:
    """(columns, `[rows, columns]` of the logits) by block, not yet written."""
    rows, slab, vocab = chunk.stop - chunk.start, chunk.slab, weight.shape[0]
    memory = weight.new_empty(rows, slab)
    blocks = []
    for start in range(0, vocab, slab):
        if start:
            memory = grad_weight[start - slab : start].view(-1)[: rows * slab].view(rows, slab)
        stop = min(start + slab, vocab)
        blocks.append((slice(start, stop), memory[:, : stop - start]))
    return blocks


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` for a fp32 total of products of any type."""
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _visit(
    chunk: Chunk,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    losses: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    *,
    adds: bool,
) -> None:
    """Losses and gradients of a chunk's tokens; grad_weight is written, or added to.

    All arguments but the chunk and the weight's are `[tokens, ...]` of the whole call.
    """
    part = slice(chunk.start, chunk.stop)
    blocks = _blocks(chunk, weight, weight if grad_weight is None else grad_weight)
    for columns, block in blocks:
        torch.mm(hidden[part], weight[columns].t(), out=block)
    first = blocks[0][1]
    with torch.cuda.device_of(first):
        cross_entropy_kernel[(chunk.stop - chunk.start,)](
            first,
            first if len(blocks) == 1 else blocks[1][1],
            labels[part],
            losses[part],
            weight.shape[0],
            chunk.slab,
            chunk.slab * weight.shape[1],
            z_loss,
            GRADIENT=grad_hidden is not None or grad_weight is not None,
            IGNORED=IGNORE_INDEX,
            TILE=TILE,
            STAGES=NUM_STAGES,
            num_warps=NUM_WARPS,
        )
    if grad_hidden is not None and len(blocks) == 1:
        torch.mm(first, weight, out=grad_hidden[part])
    total = None
    if grad_hidden is not None and len(blocks) > 1:
        total = torch.zeros(hidden[part].shape, dtype=torch.float32, device=hidden.device)
    # From the last: the gradient of a slab's weights overwrites the block after it.
    for columns, block in reversed(blocks):
        if total is not None:
            _add_product(total, block, weight[columns])
        if grad_weight is not None and not adds:
            torch.mm(block.t(), hidden[part], out=grad_weight[columns])
        elif grad_weight is not None:
            slab = grad_weight[columns]
            torch.addmm(slab, block.t(), hidden[part], out=slab)
    if total is not None and grad_hidden is not None:
        grad_hidden[part] = total


def _new_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Unwritten gradients, empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


@torch.library.custom_op("fulmen::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, that of each token, and its gradients (empty unless needed)."""
    tokens, hidden_size = hidden.shape
    labels = labels.contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight = _new_gradients(hidden, weight, need_hidden, need_weight)
    if tokens == 0:
        grad_weight.zero_()
    chunks = plan_chunks(
        tokens,
        hidden_size,
        weight.shape[0],
        element_size=weight.element_size(),
        need_weight=need_weight,
    )
    total = None
    for number, chunk in enumerate(chunks):
        adds = number % SUMMED_CHUNKS > 0
        if need_weight and number and not adds:
            part = grad_weight.to(torch.float32, copy=True) if total is None else grad_weight
            total = part if total is None else total.add_(part)
        _visit(
            chunk,
            hidden,
            weight,
            labels,
            z_loss,
            losses,
            grad_hidden if need_hidden else None,
            grad_weight if need_weight else None,
            adds=adds,
        )
    if total is not None:
        grad_weight.copy_(total.add_(grad_weight))
    return losses.sum(), losses, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    return loss, losses, *_new_gradients(hidden, weight, need_hidden, need_weight)


@torch.library.custom_op("fulmen::scale_", mutates_args=("x",))
def _scale(x: Tensor, scale: Tensor) -> None:
    """`x *= scale` for a contiguous x and an fp32 number on its device.

    `x.mul_(scale)` would round the scale to bf16 first, and reads and writes for a scale of 1 too.
    """
    if x.numel():
        with torch.cuda.device_of(x):
            scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
                x, scale, x.numel(), BLOCK=SCALE_BLOCK, num_warps=4
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.need_hidden, ctx.need_weight = inputs[4:]
    # Without this, backward would be handed zeros as large as the gradients.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    if type(grad) is not Tensor:
        # A compiler is tracing: it decides about memory, and takes no change of a saved tensor.
        return (grad.float() * scale).to(grad.dtype)
    _scale(grad, scale)
    return grad


def _backward(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        _scaled(grad_hidden, d_loss) if ctx.need_hidden else None,
        _scaled(grad_weight, d_loss) if ctx.need_weight else None,
        None,
        None,
        None,
        None,
    )


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def triton_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """`linear_cross_entropy` by the Triton kernel; see `triton_summed_cross_entropy`."""
    return triton_summed_cross_entropy(hidden, weight, labels, z_loss=z_loss)[0]


def triton_summed_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`summed_cross_entropy` by the Triton kernel, for fp32 or bf16 arguments that it has checked.

    fp32 products are torch's: exact unless the process allows TF32. Memory beyond the gradients is
    one slab and a fp32 copy of `[hidden_size, hidden_size]`, or CHUNK_BYTES.
    """
    wanted = torch.is_grad_enabled()
    loss, losses, _, _ = _linear_cross_entropy(
        hidden,
        weight,
        labels,
        z_loss,
        wanted and hidden.requires_grad,
        wanted and weight.requires_grad,
    )
    return loss, losses
