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
from cabochon.losses.stable_ratios import (
    LEAST_PARAMETER,
    alpha_pointwise,
    expm1_over,
    jensen_shannon_pointwise,
    log1p_over,
    power,
)

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
        return alpha_pointwise(1.0, log_p, log_q)


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
        return alpha_pointwise(0.0, log_p, log_q)


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
        return -self.scale * log1p_over(1.0 / u - 1.0, rest)

    def conjugate(self, v: Tensor) -> Tensor:
        grown = expm1_over(v / self.scale, 1.0 - self.beta)
        return -self.scale * log1p_over(-grown, self.beta)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        rest, v = 1.0 - self.beta, v / self.scale
        free = (1.0 - self.beta * expm1_over(v, rest)).clamp(min=0.0)
        return (rest * v).exp() / free

    def warped(self, gap: Tensor) -> Tensor:
        return expm1_over(gap / self.scale, 1.0 - self.beta)

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
        return self.scale * log1p_over(u / (1.0 - self.beta), self.beta)

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta < LEAST_PARAMETER or self.beta == 1.0:
            limit = alpha_pointwise(1.0 - round(self.beta), log_p, log_q)
            return limit[0] * self.scale, limit[1] * self.scale
        value, by_log_q = jensen_shannon_pointwise(self.beta, log_p, log_q)
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
        value, by_log_q = alpha_pointwise(0.5, log_p, log_q)
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
        return alpha_pointwise(2.0, log_p, log_q)


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
        return expm1_over(u.log(), self.a - 1.0)

    def conjugate(self, v: Tensor) -> Tensor:
        return expm1_over(self.log_ratio(v), self.a)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return self.log_ratio(v).exp()

    def warped(self, gap: Tensor) -> Tensor:
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        e = self.a - 1.0
        if abs(e) < _NEARLY_KL:
            return u * log1p_over(-warped * power(u, -e), e).exp()
        base = (warped * (-e * power(u, -e))).add_(1.0).clamp_(min=0.0)
        return power(base, 1.0 / e).mul_(u)

    def response(self, u: Tensor) -> Tensor:
        return power(u, 2.0 - self.a)

    def response_slope(self, u: Tensor) -> Tensor:
        return (2.0 - self.a) * power(u, 1.0 - self.a)

    def surplus(self, u: Tensor) -> Tensor:
        if self.a > 0.0:
            return power(u, self.a) / self.a
        return expm1_over(u.log(), self.a)

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return alpha_pointwise(self.a, log_p, log_q)

    def log_ratio(self, v: Tensor) -> Tensor:
        """log u where f'(u) = v; -inf below f'(0), inf from `sup` on."""
        return log1p_over(v, self.a - 1.0)


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
        log_u = self.log_ratio(v)
        return log_u + log_u.expm1()

    def conjugate_slope(self, v: Tensor) -> Tensor:
        return self.log_ratio(v).exp()

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
        forward = alpha_pointwise(1.0, log_p, log_q)
        backward = alpha_pointwise(0.0, log_p, log_q)
        return forward[0] + backward[0], forward[1] + backward[1]

    def log_ratio(self, v: Tensor) -> Tensor:
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
