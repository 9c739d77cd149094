"""The experts with the permutation around them, beside the bare grouped products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fulmen.kernels.moe import grouped_swiglu, permutation, permute, unpermute
from kernel_cases.case import (
    REFERENCE,
    Case,
    Cost,
    Expected,
    Inputs,
    Provider,
    Settings,
    random,
    through_registry,
)
from kernel_cases.permute import at_ends, random_experts

BARE = "bare grouped_mm"


def cases(settings: Settings) -> list[Case]:
    return [case(tokens, settings) for tokens in settings.lengths_or(8192, 32768)]


def case(tokens: int, settings: Settings) -> Case:
    """Three products forward; two for each of them backward.

    The leaves are x, the choices' weights, w1, w3 and w2.
    """
    rows, hidden, inner = tokens * settings.choices, settings.hidden, settings.inner
    num_experts = settings.experts

    def make(device: torch.device, dtype: torch.dtype) -> Inputs:
        x, gradient = (random((tokens, hidden), device, dtype) for _ in range(2))
        weights = torch.rand(tokens, settings.choices, device=device)
        w1, w3 = (
            random((num_experts, inner, hidden), device, dtype).mul_(hidden**-0.5) for _ in range(2)
        )
        w2 = random((num_experts, hidden, inner), device, dtype).mul_(inner**-0.5)
        experts = random_experts(tokens, settings, device)
        return Inputs([x, weights, w1, w3, w2], (experts,), (gradient,))

    def call(
        x: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, experts: Tensor
    ) -> Tensor:
        order = permutation(experts, num_experts)
        outputs = grouped_swiglu(permute(x, order), order.counts, w1, w3, w2)
        return unpermute(outputs, weights, order)

    flops = 2.0 * rows * 3 * hidden * inner
    providers = {
        BARE: lambda: bare_products(num_experts),
        "fulmen grouped_mm": through_registry(
            call, {"permute": "triton", "grouped_gemm": "grouped_mm", "swiglu": "triton"}
        ),
        "fulmen triton": through_registry(
            call, {"permute": "triton", "grouped_gemm": "triton", "swiglu": "triton"}
        ),
    }
    if settings.rivals:
        torch_alone = {"permute": "torch", "grouped_gemm": "torch", "swiglu": "torch"}
        providers[REFERENCE] = through_registry(call, torch_alone)
    return Case(
        op="experts",
        label=f"{rows} rows",
        tokens=tokens,
        make=make,
        truth=truth,
        forward=Cost(flops=flops),
        training=Cost(flops=3 * flops),
        providers=providers,
        baseline=BARE,
    )


def bare_products(num_experts: int) -> Provider:
    """The same rows through three grouped products forward, and six backward, nothing else."""
    scratch: dict[str, Tensor] = {}

    def prepare(x: Tensor, w1: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not scratch:
            counts = experts.flatten().bincount(minlength=num_experts)
            scratch["ends"] = counts.cumsum(0).to(torch.int32)
            scratch["outer"] = random((experts.numel(), x.shape[1]), x.device, x.dtype)
            scratch["inner"] = random((experts.numel(), w1.shape[1]), x.device, x.dtype)
        return scratch["outer"], scratch["inner"], scratch["ends"]

    def forward(x: Tensor, _: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, experts: Tensor) -> Any:
        outer, inner, ends = prepare(x, w1, experts)
        products = ((outer, w1), (outer, w3), (inner, w2))
        return [torch._grouped_mm(a, w.transpose(1, 2), offs=ends) for a, w in products]

    def training(inputs: Inputs) -> Any:
        x, _, w1, w3, w2, experts = inputs.arguments
        with torch.no_grad():
            results = [forward(x, _, w1, w3, w2, experts)]
            outer, inner, ends = prepare(x, w1, experts)
            for a, gradient, w in ((outer, inner, w1), (outer, inner, w3), (inner, outer, w2)):
                results.append(torch._grouped_mm(gradient, w, offs=ends))
                results.append(torch._grouped_mm(gradient.t(), a, offs=ends))
        return results

    return Provider(forward, training, is_checked=False)


def truth(inputs: Inputs) -> list[Expected]:
    """Expert by expert in fp64; of the matrices' gradients those of the first and last expert."""
    x, weights, w1, w3, w2 = (leaf.detach() for leaf in inputs.leaves)
    (experts,) = inputs.constants
    gradient = inputs.gradients[0]
    assert gradient is not None
    shown = sorted({0, w1.shape[0] - 1})
    output = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    d_x, d_weights = torch.zeros_like(output), torch.zeros_like(weights, dtype=torch.float64)
    of_matrices: list[list[Tensor]] = [[], [], []]
    for expert in range(w1.shape[0]):
        tokens, choices = (experts == expert).nonzero(as_tuple=True)
        leaves = [x[tokens], weights[tokens, choices], w1[expert], w3[expert], w2[expert]]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        rows, scale, a, b, c = leaves
        part = (F.silu(rows @ a.t()) * (rows @ b.t())) @ c.t() * scale.unsqueeze(1)
        d_rows, d_scale, *of_these = torch.autograd.grad(part, leaves, gradient[tokens].double())
        output.index_add_(0, tokens, part.detach())
        d_x.index_add_(0, tokens, d_rows)
        d_weights[tokens, choices] = d_scale
        if expert in shown:
            for kept, value in zip(of_matrices, of_these, strict=True):
                kept.append(value)

    def first_and_last(x: Tensor) -> Tensor:
        return x[shown]

    expected = [
        Expected("output", 0, False, at_ends, at_ends(output)),
        Expected("gradient of x", 0, True, at_ends, at_ends(d_x)),
        Expected("gradient of the weights", 1, True, at_ends, at_ends(d_weights)),
    ]
    for i, (name, values) in enumerate(zip(("w1", "w3", "w2"), of_matrices, strict=True)):
        value = torch.stack(values)
        expected.append(Expected(f"gradient of {name}", 2 + i, True, first_and_last, value))
    return expected
