"""A text through the model in pieces, so that its length costs little memory; no gradients.

From one piece to the next go, in a `Cache`, a state of fixed size in every lightning layer, keys
and values in the softmax layers, and what the tower made of the text's images. Logits are formed
only where they are asked for. With `mesh.cp` above 1 the ranks that share a row read one text
together: see `parallel/prompt.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.kernels.cross_entropy.op import IGNORE_INDEX
from fulmen.models.layers import Cache
from fulmen.models.moe import Experts
from fulmen.models.text import TextModel
from fulmen.models.vl import Images
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.prompt import PromptPart
from fulmen.trainer.prompt_images import PromptImages, no_images

CHUNK_TOKENS = 32_768
"""Tokens of a piece. Fewer cost time where a GPU has many keys to read for them; more, memory."""


@dataclass(frozen=True)
class Piece:
    """Tokens that go through the model in one pass."""

    start: int
    end: int
    is_shared: bool
    """Whether each rank that shares the row has all of them, or its part of them."""


def plan_pieces(
    tokens: int, *, chunk_tokens: int, ranks: int = 1, num_logits: int = 0
) -> list[Piece]:
    """The pieces of a text; those that logits are wanted of, at the end, are shared."""
    spread = (tokens - min(num_logits, tokens)) // ranks * ranks if ranks > 1 else 0
    chunk = max(1, chunk_tokens // ranks) * ranks
    pieces = [Piece(at, min(at + chunk, spread), False) for at in range(0, spread, chunk)]
    shared = range(spread, tokens, chunk_tokens)
    return pieces + [Piece(at, min(at + chunk_tokens, tokens), True) for at in shared]


class Reader:
    """Takes texts through a model, one at a time.

    All ranks of a mesh call alike. What one rank reads may be shorter than what another reads, but
    where weights or experts are spread every pass is collective: `passes` adds idle ones.
    """

    def __init__(
        self, model: TextModel, *, chunk_tokens: int = CHUNK_TOKENS, mesh: Mesh | None = None
    ) -> None:
        """The model is on its device, and spread over the mesh where there is one."""
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens}: must be at least 1")
        self.model, self.chunk_tokens = model, chunk_tokens
        self._experts = [module for module in model.modules() if isinstance(module, Experts)]
        self.device = next(model.parameters()).device if mesh is None else mesh.device
        self.rank, self.ranks = (0, 1) if mesh is None else (mesh.cp_rank, mesh.cp)
        self.group = None if mesh is None else mesh.cp_group

    def passes(self, tokens: int, *, num_logits: int = 0) -> int:
        """Passes that a text takes."""
        return len(self._plan(tokens, num_logits))

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        *,
        num_logits: int = 1,
        new_tokens: int = 0,
        passes: int = 0,
        images: PromptImages | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits `[num_logits, vocab_size]` of a text's last positions, and what it leaves.

        `ids` is `[tokens]` int64; `new_tokens` more find room in the cache without a copy. If one
        rank brings `images`, all do, if need be without any: the tower's weights may be spread too.
        """
        cache = Cache(max_tokens=-(-(len(ids) + new_tokens) // self.ranks) + self.ranks)
        first, logits = len(ids) - num_logits, []
        pieces = self._plan(len(ids), num_logits)
        for piece in pieces:
            wanted = max(0, piece.end - max(first, piece.start))
            # The head is called each time, for its weights may have to be gathered by all ranks.
            seen = None
            if images is not None:
                is_first = cache.patches is None
                seen = images.inputs(self._part(piece), self.device, with_tiles=is_first)
            logits.append(self._pass(ids, piece, cache, num_logits=wanted, images=seen))
        self._idle(passes - len(pieces), seen=cache.patches)
        return torch.cat(logits, dim=1)[0], cache

    @torch.no_grad()
    def step(self, token: Tensor, cache: Cache) -> Tensor:
        """Logits `[vocab_size]` behind one more token, `[1]` int64."""
        start = cache.num_tokens
        piece = Piece(start, start + 1, True)
        return self._pass(token, piece, cache, offset=start, num_logits=1)[0, 0]

    @torch.no_grad()
    def losses(self, ids: Tensor, *, passes: int = 0) -> Tensor:
        """Loss in nats of each token but the first, `[tokens - 1]` fp32, given all before it."""
        labels = ids[1:]
        cache = Cache(max_tokens=-(-len(labels) // self.ranks) + self.ranks)
        losses = torch.zeros(len(labels), device=self.device)
        pieces = self._plan(len(labels), 0)
        for piece in pieces:
            here = self._part(piece)
            found = self._pass(ids[:-1], piece, cache, labels=labels[here])[0]
            if not piece.is_shared or self.rank == 0:
                losses[here] = found.float()
        self._idle(passes - len(pieces), loss=True)
        if self.ranks > 1:
            dist.all_reduce(losses, group=self.group)
        return losses

    def _plan(self, tokens: int, num_logits: int) -> list[Piece]:
        chunk_tokens, ranks = self.chunk_tokens, self.ranks
        return plan_pieces(tokens, chunk_tokens=chunk_tokens, ranks=ranks, num_logits=num_logits)

    def _part(self, piece: Piece) -> slice:
        """This rank's tokens of a piece, in the text."""
        if piece.is_shared:
            return slice(piece.start, piece.end)
        tokens = (piece.end - piece.start) // self.ranks
        start = piece.start + self.rank * tokens
        return slice(start, start + tokens)

    def _pass(
        self,
        ids: Tensor,
        piece: Piece,
        cache: Cache,
        *,
        offset: int = 0,
        num_logits: int | None = None,
        labels: Tensor | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """One pass; `ids` begin at place `offset` of the text."""
        here = self._part(piece)
        own = ids[here.start - offset : here.stop - offset].to(self.device)
        first = here.start - piece.start
        part = PromptPart(self.rank, self.ranks, piece.is_shared) if self.ranks > 1 else None
        # A compiled block would be compiled anew for every number of keys.
        with torch.compiler.set_stance("force_eager"), self._experts_in_one_go():
            output = self.model(
                own[None],
                labels=None if labels is None else labels.to(self.device)[None],
                cache=cache,
                positions=torch.arange(first, first + len(own), device=self.device),
                row_part=part,
                images=images,
                num_logits=num_logits,
                per_token=labels is not None,
            )
        assert isinstance(output, Tensor)
        cache.num_tokens = piece.end  # the model has counted this rank's alone
        return output

    @contextmanager
    def _experts_in_one_go(self) -> Iterator[None]:
        """Experts exchange tokens for each chunk, and the pieces of ranks differ in length."""
        kept = [experts.chunk_tokens for experts in self._experts]
        for experts in self._experts:
            experts.chunk_tokens = None
        try:
            yield
        finally:
            for experts, chunk_tokens in zip(self._experts, kept, strict=True):
                experts.chunk_tokens = chunk_tokens

    def _idle(self, passes: int, *, loss: bool = False, seen: Tensor | None = None) -> None:
        ids = torch.zeros(1, dtype=torch.long, device=self.device)
        labels = torch.full_like(ids, IGNORE_INDEX) if loss else None
        for _ in range(passes):
            self._pass(
                ids,
                Piece(0, 1, True),
                Cache(patches=seen),
                num_logits=None if loss else 1,
                labels=labels,
                images=None if seen is None else no_images(self.device),
            )
