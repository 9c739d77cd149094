"""The second form of MiniMax-01's scaling law (arXiv:2501.08313, equation 13):

    L(P, T) = d + a P^alpha + b T^beta + c (P T)^gamma

P the activated parameters, T the tokens, at one number of experts. It is fitted to all points of
all curves, not to the optima alone, by L-BFGS on the Huber loss of log L from several starts, as
Hoffmann et al. (arXiv:2203.15556) fit theirs. The coefficients are positive and the exponents
negative, which is our choice: with a negative c and gamma near 0, d and c grow against each other
without end. P and T enter over their geometric means, so that all terms are of one size.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

MIN_POINTS = 14
"""Two a parameter."""
NAMES = ("d", "a", "alpha", "b", "beta", "c", "gamma")
_DELTA = 1e-3
_FIRST_STEPS, _LAST_STEPS, _FINISH = 40, 400, 2
"""Of every start, then of the best ones, and how many those are."""


def fit_joint(parameters: Array, tokens: Array, losses: Array) -> dict[str, Any] | None:
    """The seven numbers, the rms error of log L and the number of points; None if too few.

    The arrays are a point each. With P and T as given, not over their means.
    """
    if len(losses) < MIN_POINTS or len(np.unique(parameters)) < 3:
        return None
    log_p, log_t, log_l = (torch.from_numpy(np.log(x)) for x in (parameters, tokens, losses))
    mean_p, mean_t = log_p.mean(), log_t.mean()
    p, t = log_p - mean_p, log_t - mean_t
    lowest = float(log_l.exp().min())
    tried = []
    for share, exponent, mixed in product((0.3, 0.6, 0.9), (0.1, 0.4), (0.1, 0.4)):
        rest = (1 - share) * lowest / 3
        numbers = [share * lowest, rest, exponent, rest, exponent, rest, mixed]
        start = torch.tensor(numbers, dtype=torch.float64).log()
        tried.append(_search(start, p, t, log_l, steps=_FIRST_STEPS))
    tried.sort(key=lambda search: search[0])
    finished = [_search(found, p, t, log_l, steps=_LAST_STEPS) for _, found in tried[:_FINISH]]
    best = min(finished, key=lambda search: search[0])[1]
    d, a, alpha, b, beta, c, gamma = _unpack(best)
    error = (_predict(best, p, t).log() - log_l).square().mean().sqrt()
    unscaled = (
        d,
        a * (-alpha * mean_p).exp(),
        alpha,
        b * (-beta * mean_t).exp(),
        beta,
        c * (-gamma * (mean_p + mean_t)).exp(),
        gamma,
    )
    fitted = {name: float(number) for name, number in zip(NAMES, unscaled, strict=True)}
    return {**fitted, "rms_log_error": float(error), "points": len(losses)}


def predict(fitted: dict[str, Any], parameters: Array, tokens: Array) -> Array:
    """The loss that a fit gives."""
    d, a, alpha, b, beta, c, gamma = (fitted[name] for name in NAMES)
    mixed = np.asarray(c * (parameters * tokens) ** gamma)
    return np.asarray(d + a * parameters**alpha + b * tokens**beta + mixed)


def _unpack(point: Tensor) -> tuple[Tensor, ...]:
    d, a, alpha, b, beta, c, gamma = point.exp()
    return d, a, -alpha, b, -beta, c, -gamma


def _predict(point: Tensor, p: Tensor, t: Tensor) -> Tensor:
    d, a, alpha, b, beta, c, gamma = _unpack(point)
    return d + a * (alpha * p).exp() + b * (beta * t).exp() + c * (gamma * (p + t)).exp()


def _search(
    start: Tensor, p: Tensor, t: Tensor, log_l: Tensor, *, steps: int
) -> tuple[float, Tensor]:
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        # Scaled up, so that the tolerances are small beside it.
        return F.huber_loss(_predict(point, p, t).log(), log_l, delta=_DELTA) / _DELTA**2

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    value = float(loss().detach())
    return (value if np.isfinite(value) else np.inf), point.detach()
