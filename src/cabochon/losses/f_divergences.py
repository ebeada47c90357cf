"""Divergences D_f(p, q) = sum_j q_j f(p_j / q_j), one small object for each convex f.

Every f here has f(1) = f'(1) = 0, so each term of the sum is at least 0; a further c (u - 1) in f
would change no divergence of two distributions. In distillation p is the teacher, q the student.

    KL             u log u - u + 1             KL(p || q), forward
    ReverseKL      u - 1 - log u               KL(q || p)
    JensenShannon  between the two             see there for its two forms
    SquaredHellinger  (1 - sqrt u)^2           sum (sqrt p - sqrt q)^2
    ChiSquare      (u - 1)^2 / 2               Pearson
    Alpha          (u^a - 1 - a (u - 1)) / (a (a - 1))   reverse KL at 0, KL at 1, chi-square at 2
    Jeffreys       (u - 1) log u               KL(p || q) + KL(q || p)

`pointwise` is the form that losses use: it takes log-probabilities, does not overflow where the
ratio p / q would, and keeps its relative accuracy where p and q nearly agree.

Source: Roulet et al. 2025, arXiv:2501.18537; the generalised Jensen-Shannon divergence is that of
Agarwal et al. 2024, arXiv:2306.13649, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError

__all__ = [
    "KL",
    "Alpha",
    "ChiSquare",
    "FDivergence",
    "Jeffreys",
    "JensenShannon",
    "ReverseKL",
    "SquaredHellinger",
    "divergence",
    "is_kl",
    "named",
]


_NEARLY_KL = 0.2
"""Exponents 1 / (a - 1) of alpha divergences nearer to KL than this are taken by logarithms: a
rounding error of the base would grow by the exponent."""
_LEAST_PARAMETER = torch.finfo(torch.float32).tiny
"""A parameter nearer to 0 than this has no float32 to be divided by, and its divergence none that
differs from the limit."""


class FDivergence(Protocol):
    """A convex function f on [0, inf) with f(1) = f'(1) = 0, and what follows from it.

    u >= 0 is a ratio p / q, v a value of f'. All functions are elementwise, in the input's type.
    """

    @property
    def name(self) -> str:
        """The word that `named` takes, with the parameter where there is one."""
        ...

    @property
    def sup(self) -> float:
        """The end of the conjugate's domain: f'(u) as u grows, inf where it is unbounded."""
        ...

    @property
    def slope_at_zero(self) -> float:
        """f'(0); -inf for most."""
        ...

    @property
    def at_zero(self) -> float:
        """f(0); inf where p must cover q."""
        ...

    @property
    def sparse(self) -> bool:
        """f'(0) is finite: the f-softargmax gives probabilities of exactly 0."""
        ...

    def f(self, u: Tensor) -> Tensor:
        """f itself."""
        ...

    def slope(self, u: Tensor) -> Tensor:
        """f'(u)."""
        ...

    def conjugate(self, v: Tensor) -> Tensor:
        """f*(v) = max over u >= 0 of u v - f(u); inf from `sup` on."""
        ...

    def conjugate_slope(self, v: Tensor) -> Tensor:
        """The u of that maximum: the inverse of `slope`, 0 below f'(0); inf from `sup` on."""
        ...

    def warped(self, gap: Tensor) -> Tensor:
        """What `lowered` takes in place of a gap: the part of its work that no u changes."""
        ...

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        """The ratio whose slope is the gap >= 0 below that of u > 0, 0 where there is none.

        It is (f*)'(f'(u) - gap) without the cancellation in f'(u) - gap; 0 at a gap of inf.
        """
        ...

    def response(self, u: Tensor) -> Tensor:
        """1 / f''(u), which is (f*)'' at f'(u): how fast the ratio follows the slope."""
        ...

    def response_slope(self, u: Tensor) -> Tensor:
        """The derivative of `response`; only asked for at u > 0."""
        ...

    def surplus(self, u: Tensor) -> Tensor:
        """f*(f'(u)) + f(0), so 0 at u = 0; without f(0) where that is infinite."""
        ...

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """q f(p / q) and its derivative by log q, q (f(u) - u f'(u)), at u = p / q.

        Their difference, p f'(u), is the derivative by log p. Log-probabilities may be -inf;
        what is infinite there comes out as inf, what has a finite limit as that limit.
        """
        ...


@dataclass(frozen=True)
class KL:
    """f(u) = u log u - u + 1: KL(p || q), finite where q covers p."""

    name = "forward_kl"
    sup = math.inf
    slope_at_zero = -math.inf
    at_zero = 1.0
    sparse = False

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        return u.log()

    def conjugate(self, v: Tensor) -> Tensor:
        return v.expm1()

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return v.exp()

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        return u * (-warped).exp()

    def response(self, u: Tensor) -> Tensor:
        return u

    def response_slope(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def surplus(self, u: Tensor) -> Tensor:
        return u

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return _alpha_pointwise(1.0, log_p, log_q)


@dataclass(frozen=True)
class ReverseKL:
    """f(u) = u - 1 - log u: KL(q || p), finite where p covers q."""

    name = "reverse_kl"
    sup = 1.0
    slope_at_zero = -math.inf
    at_zero = math.inf
    sparse = False

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        return 1.0 - 1.0 / u

    def conjugate(self, v: Tensor) -> Tensor:
        return -(-v.clamp(max=1.0)).log1p()

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return 1.0 / (1.0 - v.clamp(max=1.0))

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        return (u * warped).add_(1.0).reciprocal_().mul_(u)

    def response(self, u: Tensor) -> Tensor:
        return u * u

    def response_slope(self, u: Tensor) -> Tensor:
        return 2.0 * u

    def surplus(self, u: Tensor) -> Tensor:
        return u.log()

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return _alpha_pointwise(0.0, log_p, log_q)


@dataclass(frozen=True)
class JensenShannon:
    """The generalised Jensen-Shannon divergence, with m = beta p + (1 - beta) q.

    "paper" is beta KL(p || m) + (1 - beta) KL(q || m), which vanishes as beta nears 0 or 1.
    "rescaled" is the same over beta (1 - beta): KL(p || q) at beta = 0, KL(q || p) at beta = 1,
    and continuous in between. At beta = 1/2 it is 4 times the paper's.
    """

    beta: float = 0.5
    form: Literal["rescaled", "paper"] = "rescaled"

    sparse = False
    slope_at_zero = -math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"beta must lie in [0, 1], got {self.beta}")
        if self.form not in ("rescaled", "paper"):
            raise ConfigError(f"form must be 'rescaled' or 'paper', got {self.form!r}")
        if self.form == "paper" and self.beta in (0.0, 1.0):
            limit = "forward" if self.beta == 0.0 else "reverse"
            raise ConfigError(
                f"the paper's form at beta = {self.beta:g} is 0 for any two distributions; "
                f"its rescaled form, jsd, is {limit} KL there"
            )

    @property
    def name(self) -> str:
        return f"{'jsd' if self.form == 'rescaled' else 'jsd_paper'}({self.beta:g})"

    @property
    def scale(self) -> float:
        """What multiplies the rescaled form."""
        return 1.0 if self.form == "rescaled" else self.beta * (1.0 - self.beta)

    @property
    def sup(self) -> float:
        if self.beta == 0.0:
            return math.inf
        rest = 1.0 - self.beta
        return self.scale * (1.0 if rest == 0.0 else -math.log1p(-rest) / rest)

    @property
    def at_zero(self) -> float:
        if self.beta == 1.0:
            return math.inf
        return self.scale * (1.0 if self.beta == 0.0 else -math.log1p(-self.beta) / self.beta)

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        # log(u / m) / (1 - beta), m = 1 + beta (u - 1)
        rest = 1.0 - self.beta
        return -self.scale * _log1p_over(1.0 / u - 1.0, rest)

    def conjugate(self, v: Tensor) -> Tensor:
        grown = _expm1_over(v / self.scale, 1.0 - self.beta)
        return -self.scale * _log1p_over(-grown, self.beta)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        rest, v = 1.0 - self.beta, v / self.scale
        free = (1.0 - self.beta * _expm1_over(v, rest)).clamp(min=0.0)
        return (rest * v).exp() / free

    def warped(self, gap: Tensor) -> Tensor:
        return _expm1_over(gap / self.scale, 1.0 - self.beta)

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        mixture = 1.0 + self.beta * (u - 1.0)
        return (mixture * warped).add_(1.0).reciprocal_().mul_(u)

    def response(self, u: Tensor) -> Tensor:
        return (u * self.beta).add_(1.0 - self.beta).mul_(u).div_(self.scale)

    def response_slope(self, u: Tensor) -> Tensor:
        return (1.0 + self.beta * (2.0 * u - 1.0)) / self.scale

    def surplus(self, u: Tensor) -> Tensor:
        if self.beta == 1.0:
            return u.log()
        return self.scale * _log1p_over(u / (1.0 - self.beta), self.beta)

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta < _LEAST_PARAMETER or self.beta == 1.0:
            limit = _alpha_pointwise(1.0 - round(self.beta), log_p, log_q)
            return limit[0] * self.scale, limit[1] * self.scale
        value, by_log_q = _jensen_shannon_pointwise(self.beta, log_p, log_q)
        return value * self.scale, by_log_q * self.scale


@dataclass(frozen=True)
class SquaredHellinger:
    """f(u) = (1 - sqrt u)^2: the squared distance of the square roots, at most 2."""

    name = "hellinger"
    sup = 1.0
    slope_at_zero = -math.inf
    at_zero = 1.0
    sparse = False

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        return 1.0 - u.rsqrt()

    def conjugate(self, v: Tensor) -> Tensor:
        v = v.clamp(max=1.0)
        return v / (1.0 - v)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return (1.0 - v.clamp(max=1.0)) ** -2

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        return (u.sqrt() * warped).add_(1.0).square_().reciprocal_().mul_(u)

    def response(self, u: Tensor) -> Tensor:
        return 2.0 * u * u.sqrt()

    def response_slope(self, u: Tensor) -> Tensor:
        return 3.0 * u.sqrt()

    def surplus(self, u: Tensor) -> Tensor:
        return u.sqrt()

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value, by_log_q = _alpha_pointwise(0.5, log_p, log_q)
        return value * 0.5, by_log_q * 0.5


@dataclass(frozen=True)
class ChiSquare:
    """f(u) = (u - 1)^2 / 2: Pearson's, halved; its softargmax with unit q is sparsemax."""

    name = "chi_square"
    sup = math.inf
    slope_at_zero = -1.0
    at_zero = 0.5
    sparse = True

    def f(self, u: Tensor) -> Tensor:
        return 0.5 * (u - 1.0) ** 2

    def slope(self, u: Tensor) -> Tensor:
        return u - 1.0

    def conjugate(self, v: Tensor) -> Tensor:
        v = v.clamp(min=-1.0)
        return v + 0.5 * v * v

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return 1.0 + v.clamp(min=-1.0)

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        return (u - warped).clamp_(min=0.0)

    def response(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def response_slope(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def surplus(self, u: Tensor) -> Tensor:
        return 0.5 * u * u

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return _alpha_pointwise(2.0, log_p, log_q)


@dataclass(frozen=True)
class Alpha:
    """f(u) = (u^a - 1 - a (u - 1)) / (a (a - 1)), for any a; its limits at 0 and 1 are exact.

    Its softargmax with unit q is alpha-entmax; above 1 it is sparse.
    """

    a: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.a):
            raise ConfigError(f"alpha must be a finite number, got {self.a}")

    @property
    def name(self) -> str:
        return f"alpha({self.a:g})"

    @property
    def sup(self) -> float:
        return 1.0 / (1.0 - self.a) if self.a < 1.0 else math.inf

    @property
    def slope_at_zero(self) -> float:
        return 1.0 / (1.0 - self.a) if self.a > 1.0 else -math.inf

    @property
    def at_zero(self) -> float:
        return 1.0 / self.a if self.a > 0.0 else math.inf

    @property
    def sparse(self) -> bool:
        return self.a > 1.0

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        return _expm1_over(u.log(), self.a - 1.0)

    def conjugate(self, v: Tensor) -> Tensor:
        return _expm1_over(self._log_ratio(v), self.a)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return self._log_ratio(v).exp()

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        e = self.a - 1.0
        if abs(e) < _NEARLY_KL:
            return u * _log1p_over(-warped * _power(u, -e), e).exp()
        base = (warped * (-e * _power(u, -e))).add_(1.0).clamp_(min=0.0)
        return _power(base, 1.0 / e).mul_(u)

    def response(self, u: Tensor) -> Tensor:
        return _power(u, 2.0 - self.a)

    def response_slope(self, u: Tensor) -> Tensor:
        return (2.0 - self.a) * _power(u, 1.0 - self.a)

    def surplus(self, u: Tensor) -> Tensor:
        if self.a > 0.0:
            return _power(u, self.a) / self.a
        return _expm1_over(u.log(), self.a)

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return _alpha_pointwise(self.a, log_p, log_q)

    def _log_ratio(self, v: Tensor) -> Tensor:
        """log u where f'(u) = v; -inf below f'(0), inf from `sup` on."""
        return _log1p_over(v, self.a - 1.0)


@dataclass(frozen=True)
class Jeffreys:
    """f(u) = (u - 1) log u: KL(p || q) + KL(q || p)."""

    name = "jeffreys"
    sup = math.inf
    slope_at_zero = -math.inf
    at_zero = math.inf
    sparse = False

    def f(self, u: Tensor) -> Tensor:
        return _of_ratio(self, u)

    def slope(self, u: Tensor) -> Tensor:
        return u.log() + 1.0 - 1.0 / u

    def conjugate(self, v: Tensor) -> Tensor:
        # u v - f(u) with v = log u + 1 - 1 / u
        log_u = self._log_ratio(v)
        return log_u + log_u.expm1()

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return self._log_ratio(v).exp()

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        # The root y = log(u / result) of y + expm1(y) / u = gap: increasing, convex, from above.
        gap = warped
        y = torch.minimum(gap, (gap * u).log1p())
        for _ in range(8):
            excess = y.expm1() / u
            y = y - (y - gap + excess) / (1.0 + 1.0 / u + excess)
        return (u * (-y).exp()).masked_fill(gap == math.inf, 0.0)

    def response(self, u: Tensor) -> Tensor:
        return u * u / (1.0 + u)

    def response_slope(self, u: Tensor) -> Tensor:
        return u * (2.0 + u) / (1.0 + u).square()

    def surplus(self, u: Tensor) -> Tensor:
        return (u - 1.0) + u.log()

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        forward = _alpha_pointwise(1.0, log_p, log_q)
        backward = _alpha_pointwise(0.0, log_p, log_q)
        return forward[0] + backward[0], forward[1] + backward[1]

    def _log_ratio(self, v: Tensor) -> Tensor:
        """The root y = log u of y - expm1(-y) = v (u = 1 / W(e^(1 - v)), Lambert's W)."""
        y = torch.where(v > 0.0, v, -(-v.clamp(max=0.0)).log1p())
        for _ in range(8):  # Newton on an increasing concave function; quadratic from here
            y = y - (y - (-y).expm1() - v) / (1.0 + (-y).exp())
        return y


def named(name: str, parameter: float | None = None) -> FDivergence:
    """The divergence that a config means.

    Args:
        name: forward_kl, reverse_kl, jsd, jsd_paper, hellinger, chi_square, alpha or jeffreys.
        parameter: beta in [0, 1] of jsd (the rescaled form) and jsd_paper; a of alpha; of the
            others none.

    Raises:
        ConfigError: no such name; a parameter out of range, missing or superfluous.
    """
    plain: dict[str, Any] = {
        "forward_kl": KL,
        "reverse_kl": ReverseKL,
        "hellinger": SquaredHellinger,
        "chi_square": ChiSquare,
        "jeffreys": Jeffreys,
    }
    if name in plain:
        if parameter is not None:
            raise ConfigError(f"{name} takes no parameter, got {parameter:g}; leave it out")
        made: FDivergence = plain[name]()
        return made
    if name not in ("jsd", "jsd_paper", "alpha"):
        known = ", ".join([*plain, "jsd", "jsd_paper", "alpha"])
        raise ConfigError(f"no divergence is called {name!r}; choose one of {known}")
    if parameter is None:
        meaning = "a, any number" if name == "alpha" else "beta, in [0, 1]"
        raise ConfigError(f"{name} needs its parameter: {meaning}")
    if name == "alpha":
        return Alpha(parameter)
    return JensenShannon(parameter, "rescaled" if name == "jsd" else "paper")


def is_kl(f: FDivergence) -> bool:
    """It is KL(p || q), by whatever name."""
    rescaled = isinstance(f, JensenShannon) and f.beta == 0.0
    return isinstance(f, KL) or rescaled or (isinstance(f, Alpha) and f.a == 1.0)


def divergence(f: FDivergence, p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """D_f(softmax(p_logits), softmax(q_logits)) of each row, differentiable by both (once).

    Args:
        f: which.
        p_logits: ... V, the teacher's.
        q_logits: ... V, the student's.

    Returns:
        ... float32 (float64 for float64 logits); inf where it is infinite.
    """
    wide = torch.promote_types(torch.promote_types(p_logits.dtype, q_logits.dtype), torch.float32)
    log_p, log_q = p_logits.to(wide).log_softmax(-1), q_logits.to(wide).log_softmax(-1)
    terms: Tensor = _Terms.apply(f, log_p, log_q)
    return terms.sum(-1)


class _Terms(torch.autograd.Function):
    """q f(p / q) with the derivatives that `pointwise` gives."""

    @staticmethod
    def forward(ctx: Any, f: FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
        value, by_log_q = f.pointwise(log_p, log_q)
        # What cannot be said cannot learn: where p = 0, log p stays at -inf.
        by_log_p = (value - by_log_q).masked_fill(log_p == -math.inf, 0.0)
        ctx.save_for_backward(by_log_p, by_log_q.masked_fill(log_q == -math.inf, 0.0))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        factors: tuple[Tensor, Tensor] = ctx.saved_tensors
        return None, grad * factors[0], grad * factors[1]


def _of_ratio(f: FDivergence, u: Tensor) -> Tensor:
    """f(u) from the stable form, with q = 1."""
    return f.pointwise(u.log(), torch.zeros_like(u))[0]


def _power(x: Tensor, exponent: float) -> Tensor:
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


def _expm1_over(x: Tensor, e: float) -> Tensor:
    """(exp(e x) - 1) / e, and its limit x at e = 0."""
    return x if e == 0.0 else (e * x).expm1() / e


def _log1p_over(x: Tensor, e: float) -> Tensor:
    """log(1 + e x) / e, and its limit x at e = 0; log 0 where 1 + e x is negative."""
    return x if e == 0.0 else (e * x).clamp(min=-1.0).log1p() / e


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
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


def _alpha_pointwise(a: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`FDivergence.pointwise` of alpha divergences, continuous in a.

    With d = log(p / q) and E(e) = expm1(e d) / e, which is d at e = 0, the value is
    (p E(a - 1) - (p - q)) / a, or equally ((p - q) - q E(a)) / (1 - a): each is free of
    cancellation at one of the two limits. The derivative is -q E(a).
    """
    a = a if abs(a) >= _LEAST_PARAMETER else 0.0
    d = _log_ratio(log_p, log_q)
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


def _jensen_shannon_pointwise(beta: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """`FDivergence.pointwise` of the rescaled form for 0 < beta < 1.

    With d = log(p / q) and L(c, d) = log(1 + c expm1(d)), so that log(m / q) = L(beta, d), the
    value is (p d - m L / beta) / (1 - beta) and the derivative -q L / beta. The divergence of
    1 - beta is that of beta with p and q exchanged, so c <= 1/2 always and nothing cancels.
    """
    # Where one is e^80 (e^600) times the other, only that one matters to these sums.
    far = 80.0 if log_p.dtype != torch.float64 else 600.0
    d = _log_ratio(log_p, log_q).clamp(-far, far)
    p, q = log_p.exp(), log_q.exp()
    mixture = beta * p + (1.0 - beta) * q
    if beta <= 0.5:
        log_mixture = _log1p_over(d.expm1(), beta)
        value = (p * d - mixture * log_mixture) / (1.0 - beta)
        by_log_q = -q * log_mixture
    else:
        log_mixture = _log1p_over((-d).expm1(), 1.0 - beta)
        value = -(q * d + mixture * log_mixture) / beta
        by_log_q = -q * (d + (1.0 - beta) * log_mixture) / beta
    rest = 1.0 - beta
    rates = (rest, rest * (1.0 - 2.0 * beta), rest * (1.0 - 6.0 * beta * rest))
    close = _near_one(d, rates) * q
    return torch.where(_small(d, 1.0), close, value), by_log_q
