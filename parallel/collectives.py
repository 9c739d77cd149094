"""Collectives between one tensor a rank and the ranks' tensors side by side in one.

Those of lists would be copied through such a tensor by NCCL.
"""

from typing import Any

import torch.distributed as dist

# torch 2.13 has new names for these, and warns of the old ones.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
