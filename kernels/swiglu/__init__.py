"""SwiGLU: SiLU of the gate times the up projection."""

from fulmen.kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
