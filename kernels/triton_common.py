"""What Triton kernels of several ops share."""

# Kernels carry no Python types; their launchers do.
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, accumulator):
    """`accumulator + a @ b` in fp32, exact for fp32 operands (no tf32)."""
    # Triton's interpreter keeps bf16 as 16-bit integers and would multiply those.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def silu(x):
    """`x sigmoid(x)` in fp32."""
    x = x.to(tl.float32)
    return x / (1 + tl.exp(-x))


@triton.jit
def silu_gradient(dy, x):
    """`dy silu'(x)` in fp32."""
    x = x.to(tl.float32)
    sigmoid = tl.sigmoid(x)
    return dy.to(tl.float32) * sigmoid * (1 + x * (1 - sigmoid))
