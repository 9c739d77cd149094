"""How kernels that work on rows are cut: threads, pieces of a row, programs, loads in flight.

No import of Triton here: on a machine without it the ops still choose their references.
"""

from dataclasses import dataclass

from torch import Tensor

from fulmen.kernels.common import num_processors, shared_bytes, why_not_dtype

LONGEST_ROW = 16384
THREADS_PER_WARP = 32
NUMBERS_PER_LOAD = 8
"""16 bytes of bf16 a thread; fp32 takes two loads."""
NUMBERS_PER_THREAD = 24
MAX_WARPS = 16
FORWARD_WARPS_PER_PROCESSOR = 32
"""At 64 registers a thread: a row's numbers in fp32, and the weight in its own type."""
BACKWARD_WARPS_PER_PROCESSOR = 16
"""At 128 registers: besides, the sum of the weight's gradient in fp32, and a second input."""
ROWS_IN_FLIGHT = 2
"""Rows that a program loads ahead while it reduces one."""
SHARED_BYTES_PER_PROCESSOR = 200 * 2**10
"""Of the 228 KiB of an H100 or H200; other chips have less."""
REGISTERS_PER_PROCESSOR = 65536
MAX_REGISTERS = 255
PROCESSORS_WITHOUT_GPU = 1
"""The interpreter's chip."""


def unsupported(x: Tensor, weight: Tensor) -> str:
    """Why the Triton kernels cannot take rows of `x`, on whatever device, or ""."""
    if reason := why_not_dtype(x, weight):
        return reason
    return f"needs a hidden size of at most {LONGEST_ROW}" if x.shape[-1] > LONGEST_ROW else ""


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the weight is `[hidden]` for `x` `[..., hidden]`."""
    if x.dim() == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight must be [hidden], the last dim of the input, got {tuple(weight.shape)} "
            f"for {tuple(x.shape)}"
        )


@dataclass(frozen=True)
class Plan:
    """One launch: programs that stay and take every `programs`-th row."""

    programs: int
    num_warps: int
    piece: int
    """Numbers of a row that one round of loads brings, a power of two. A row is whole pieces (the
    last one masked), not one padded block: at 6144 that saves a quarter of the registers."""
    num_stages: int
    """Depth of Triton's pipeline of loads: rows in flight + 1."""
    registers: int
    """Most that a thread may have, so that as many programs run together as planned."""

    def options(self) -> dict[str, int]:
        """Arguments of every kernel that follows a plan, and of its launch."""
        return {
            "PIECE": self.piece,
            "STAGES": self.num_stages,
            "num_warps": self.num_warps,
            "maxnreg": self.registers,
        }


def make_plan(x: Tensor, *, num_inputs: int, warps_per_processor: int) -> Plan:
    """Plan for rows shaped like those of `x`, of which a kernel reads `num_inputs` tensors.

    For H100 and H200, by count: at 6144 in bf16 four programs a multiprocessor run forward and two
    backward, each with two rows of every input under way: 96 KiB an input forward, 48 backward,
    where 4.3 TB/s ask for about 32 in all. Beyond 6144 one program of 16 warps runs backward.
    """
    hidden = x.shape[-1]
    threads_wanted = -(-hidden // NUMBERS_PER_THREAD)
    num_warps = 1
    while num_warps * THREADS_PER_WARP < threads_wanted and num_warps < MAX_WARPS:
        num_warps *= 2
    threads = num_warps * THREADS_PER_WARP
    piece = threads * NUMBERS_PER_LOAD
    padded = -(-hidden // piece) * piece
    # The longest rows need more registers a thread than the others.
    together = warps_per_processor // num_warps if padded <= threads * NUMBERS_PER_THREAD else 1
    shared = shared_bytes(x.device, SHARED_BYTES_PER_PROCESSOR)
    fitting = shared // (together * num_inputs * padded * x.element_size())
    processors = num_processors(x.device, PROCESSORS_WITHOUT_GPU)
    return Plan(
        programs=min(x.numel() // hidden, together * processors),
        num_warps=num_warps,
        piece=piece,
        num_stages=1 + min(ROWS_IN_FLIGHT, fitting),
        registers=min(MAX_REGISTERS, REGISTERS_PER_PROCESSOR // (together * threads)),
    )
