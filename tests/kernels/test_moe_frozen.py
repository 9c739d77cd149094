"""Experts that are frozen: the fused backward pass makes the gradient of their rows alone."""

import pytest
import torch
from support.interpreter import DEVICE, on_kernels, run_in_interpreter, without_kernels

from fulmen.kernels.moe import triton_experts, with_late_gradients
from fulmen.kernels.moe.late_gradients import late_grouped_swiglu
from fulmen.kernels.moe.triton_experts import fused_grouped_swiglu


@without_kernels
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@on_kernels
@pytest.mark.parametrize("late", [False, True])
def test_no_gradients_of_weights(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(9, 20), (3, 12, 20), (3, 12, 20), (3, 20, 12)]
    x, *weights = (torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes)
    counts, projection = torch.tensor([3, 0, 5], device=DEVICE), torch.randn(9, 20, device=DEVICE)
    trained = fused_grouped_swiglu(x, counts, *weights, "triton")
    (expected,) = torch.autograd.grad(trained, [x], projection, retain_graph=True)
    assert all(gradient.any() for gradient in torch.autograd.grad(trained, weights, projection))

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("gradients of weights that are frozen")

    monkeypatch.setattr(triton_experts, "weights_backward", unwanted)
    for weight in weights:
        weight.requires_grad_(False)
    if late:
        *matrices, rest = with_late_gradients(*weights)
        got = late_grouped_swiglu(x, counts, *matrices, "triton", rest)
    else:
        got = fused_grouped_swiglu(x, counts, *weights, "triton")
    (mine,) = torch.autograd.grad(got, [x], projection)
    assert torch.equal(got, trained)
    assert torch.equal(mine, expected)
