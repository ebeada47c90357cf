"""Functions of the ratio of two probabilities that neither overflow nor cancel.

They are what the divergences of `f_divergences` are written with: log-probabilities in, values that
keep their relative accuracy where p and q nearly agree and where one is nothing beside the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LEAST_PARAMETER",
    "alpha_pointwise",
    "expm1_over",
    "jensen_shannon_pointwise",
    "log1p_over",
    "log_ratio",
    "power",
]

LEAST_PARAMETER = torch.finfo(torch.float32).tiny
"""A parameter nearer to 0 than this has no float32 to be divided by, and its divergence none that
differs from the limit."""


def power(x: Tensor, exponent: float) -> Tensor:
    """X ** exponent for x >= 0; halves of small whole numbers by products and roots."""
    halves = 2.0 * abs(exponent)
    if not (halves.is_integer() and 0.0 < halves <= 16.0):
        power: Tensor = x.pow(exponent)
        return power
    whole, half = divmod(int(halves), 2)
    factors = [torch.sqrt(x)] if half else []
    square = x
    while whole:
        if whole % 2:
            factors.append(square)
        whole //= 2
        square = torch.square(square) if whole else square
    made = factors.pop()
    for factor in factors:
        made = made * factor
    return made if exponent > 0.0 else torch.reciprocal(made)


def expm1_over(x: Tensor, e: float) -> Tensor:
    """(exp(e x) - 1) / e, and its limit x at e = 0."""
    return x if e == 0.0 else (e * x).expm1() / e


def log1p_over(x: Tensor, e: float) -> Tensor:
    """log(1 + e x) / e, and its limit x at e = 0; log 0 where 1 + e x is negative."""
    return x if e == 0.0 else (e * x).clamp(min=-1.0).log1p() / e


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q; 0 where both are -inf, as nothing is different there."""
    both = (log_p == -math.inf) & (log_q == -math.inf)
    return (log_p - log_q).masked_fill(both, 0.0)


def _difference(log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """p - q to the last digit also where they nearly agree."""
    gap = (-log_ratio.abs()).expm1()
    return torch.where(log_ratio > 0.0, -gap * log_p.exp(), gap * log_q.exp())


def _times(log_x: Tensor, y: Tensor) -> Tensor:
    """x y, which is 0 where x is 0 whatever y."""
    return (log_x.exp() * y).masked_fill(log_x == -math.inf, 0.0)


def _near_one(log_ratio: Tensor, rates: tuple[float, float, float]) -> Tensor:
    """f(e^d) for small d, by its series, so that it is never below 0.

    With g(d) = f(e^d), g'' = g' + h where h(d) = u^2 f''(u); `rates` are h', h'', h''' at 0, where
    h = 1.
    """
    third = 1.0 + rates[0]
    fourth = third + rates[1]
    fifth = fourth + rates[2]
    d = log_ratio
    return 0.5 * d * d * (1.0 + d * (third / 3.0 + d * (fourth / 12.0 + d * (fifth / 60.0))))


def _small(log_ratio: Tensor, rate: float) -> Tensor:
    """Where four terms of the series are as good as the type can say."""
    limit = math.pow(torch.finfo(log_ratio.dtype).eps, 0.2)
    return log_ratio.abs() < limit / max(1.0, abs(rate))


def alpha_pointwise(a: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`FDivergence.pointwise` of alpha divergences, continuous in a.

    With d = log(p / q) and E(e) = expm1(e d) / e, which is d at e = 0, the value is
    (p E(a - 1) - (p - q)) / a, or equally ((p - q) - q E(a)) / (1 - a): each is free of
    cancellation at one of the two limits. The derivative is -q E(a).
    """
    a = a if abs(a) >= LEAST_PARAMETER else 0.0
    d = log_ratio(log_p, log_q)
    difference = _difference(log_p, log_q, d)

    def grown(log_x: Tensor, e: float) -> Tensor:
        """X E(e), through p^a q^(1 - a) = x exp(e d) where the exponential could overflow."""
        if e == 0.0:
            return _times(log_x, d)
        if a == 1.0:  # here e = 1 and X = q
            return difference
        far = _log_power(a, log_p, log_q).exp() - log_x.exp()
        near = log_x.exp() * (e * d).expm1()
        return torch.where((e * d).abs() < 1.0, near, far) / e

    rising = grown(log_q, a)
    if a >= 0.5:
        value = (grown(log_p, a - 1.0) - difference) / a
    else:
        value = (difference - rising) / (1.0 - a)
    close = _near_one(d, (a, a * a, a * a * a)) * log_q.exp()
    return torch.where(_small(d, a), close, value), -rising


def _log_power(a: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """a log p + (1 - a) log q for a other than 0 and 1; -inf where both are."""
    both = (log_p == -math.inf) & (log_q == -math.inf)
    return (a * log_p + (1.0 - a) * log_q).masked_fill(both, -math.inf)


def jensen_shannon_pointwise(beta: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`FDivergence.pointwise` of the rescaled form for 0 < beta < 1.

    With d = log(p / q) and L(c, d) = log(1 + c expm1(d)), so that log(m / q) = L(beta, d), the
    value is (p d - m L / beta) / (1 - beta) and the derivative -q L / beta. The divergence of
    1 - beta is that of beta with p and q exchanged, so c <= 1/2 always and nothing cancels.
    """
    # Where one is e^80 (e^600) times the other, only that one matters to these sums.
    far = 80.0 if log_p.dtype != torch.float64 else 600.0
    d = log_ratio(log_p, log_q).clamp(-far, far)
    p, q = log_p.exp(), log_q.exp()
    mixture = beta * p + (1.0 - beta) * q
    if beta <= 0.5:
        log_mixture = log1p_over(d.expm1(), beta)
        value = (p * d - mixture * log_mixture) / (1.0 - beta)
        by_log_q = -q * log_mixture
    else:
        log_mixture = log1p_over((-d).expm1(), 1.0 - beta)
        value = -(q * d + mixture * log_mixture) / beta
        by_log_q = -q * (d + (1.0 - beta) * log_mixture) / beta
    rest = 1.0 - beta
    rates = (rest, rest * (1.0 - 2.0 * beta), rest * (1.0 - 6.0 * beta * rest))
    close = _near_one(d, rates) * q
    return torch.where(_small(d, 1.0), close, value), by_log_q
