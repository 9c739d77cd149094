"""Context parallelism: a row's tokens are spread over the ranks of one group, in contiguous parts.

Documents may begin, end or cross anywhere. Every rank knows the boundaries of the whole row, so
what has to be exchanged is known without asking:

- lightning layers: a state of fixed size a rank, see lasp.py;
- softmax layers: keys and values, see softmax.py;
- the load-balancing loss: counts of assignments are summed.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from fulmen.parallel.progress import exchange


@dataclass(frozen=True)
class RowPart:
    """Where one rank's part of a row lies in it."""

    rank: int
    size: int
    tokens: int
    """Of each part."""
    bounds: tuple[int, ...]
    """Of all documents of the row, from 0 to its end."""

    @property
    def first(self) -> int:
        """Index in the row of the part's first token."""
        return self.rank * self.tokens

    def document_before(self, token: int) -> int:
        """First token of the document that the token in front of `token` belongs to."""
        return self.bounds[bisect_left(self.bounds, token) - 1]

    @cached_property
    def first_sender(self) -> int:
        """First rank at whose end the document of this part's first token has begun; or `rank`."""
        return min(self.rank, self.document_before(self.first + 1) // self.tokens)

    @cached_property
    def last_receiver(self) -> int:
        """Last rank at whose start the document of this part's last token goes on; or `rank`."""
        end = self.first + self.tokens
        behind = self.bounds[bisect_left(self.bounds, end)]
        return max(self.rank, (behind - 1) // self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document in this part, without empty ones."""
        end = self.first + self.tokens
        inside = sorted({bound for bound in self.bounds if self.first < bound < end})
        return [b - a for a, b in pairwise([self.first, *inside, end])]


def sum_counts(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    """Assignments per expert over all parts of a row; `MoE.count_over_row`."""
    total = counts.clone()
    with exchange("counts of the router", group):
        dist.all_reduce(total, group=group)
    return total
