"""An f-divergence of one's own, from three formulas.

    LE_CAM = OwnF(
        name="le_cam",
        f=lambda u: (u - 1) ** 2 / (u + 1),
        slope=lambda u: 1 - 4 / (u + 1) ** 2,
        inverse=lambda v: 2 / (1 - v).sqrt() - 1,
        slope_at_zero=-3.0,
        at_zero=1.0,
        sup=1.0,
    )

Everything that takes an f of `f_divergences` takes it: divergences, Fenchel-Young losses, the
f-softargmax. What those write out by hand is worked out here in float64 and by autograd, at several
times the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError

__all__ = ["OwnF"]

_LARGEST_LOG = 300.0
"""Of log-ratios: the square of the ratio still fits into float64."""
_BEYOND = 1e100
"""Limits that are larger, as far out as that, are infinite."""
_SAMPLES = torch.logspace(-3, 3, 61, dtype=torch.float64)
_CLOSE = 1e-6


@dataclass(frozen=True, kw_only=True)
class OwnF:
    """A convex f with f(1) = f'(1) = 0, in functions of tensors; what they claim is checked."""

    name: str
    f: Callable[[Tensor], Tensor]
    """f(u), u >= 0, elementwise."""
    slope: Callable[[Tensor], Tensor]
    """f'(u), differentiable by autograd twice."""
    inverse: Callable[[Tensor], Tensor]
    """The u > 0 at which the slope is v, for v between `slope_at_zero` and `sup`."""
    slope_at_zero: float = -math.inf
    """f'(0); where it is finite the f-softargmax is sparse."""
    at_zero: float = math.inf
    """f(0)."""
    sup: float = math.inf
    """f'(u) as u grows."""

    def __post_init__(self) -> None:
        u = _SAMPLES.clone().requires_grad_()
        one = torch.ones(1, dtype=torch.float64)
        with torch.enable_grad():
            value = self.f(u)
            (derivative,) = torch.autograd.grad(value.sum(), u)
        slope = self.slope(u).detach()
        scale = slope.abs().clamp(min=1.0)
        back = self.inverse(slope)
        for wrong, reason in (
            (self.f(one).abs() + self.slope(one).abs() > _CLOSE, "f(1) and f'(1) must be 0: add a "
             "multiple of u - 1, which changes no divergence"),
            (((derivative - slope) / scale).abs().max() > _CLOSE, "slope is not f's derivative"),
            ((slope.diff() <= 0).any(), "f is not strictly convex: its slope must grow"),
            (not (back / _SAMPLES - 1.0).abs().max() < _CLOSE, "inverse does not undo slope"),
            (self.slope_at_zero >= slope[0], "slope_at_zero is not below the slope at 0.001"),
            (self.sup <= slope[-1], "sup is not above the slope at 1000"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(f"{self.name}: {reason}")

    @property
    def sparse(self) -> bool:
        """f'(0) is finite."""
        return math.isfinite(self.slope_at_zero)

    def conjugate_slope(self, v: Tensor) -> Tensor:
        """The inverse of `slope`, 0 below f'(0), inf from `sup` on."""
        inside = (v > self.slope_at_zero) & (v < self.sup)
        found = self.inverse(torch.where(inside, v, 0.0))
        return torch.where(inside, found, torch.where(v >= self.sup, math.inf, 0.0))

    def conjugate(self, v: Tensor) -> Tensor:
        """f*(v) = u v - f(u) at u = `conjugate_slope`."""
        u = self.conjugate_slope(v)
        inside = u.isfinite() & (u > 0.0)
        at = torch.where(inside, u, 1.0)
        return torch.where(
            inside, at * v - self.f(at), torch.where(u > 0.0, math.inf, -self.at_zero)
        )

    def warped(self, gap: Tensor) -> Tensor:
        """The gap itself."""
        return gap

    def lowered(self, u: Tensor, warped: Tensor) -> Tensor:
        """The ratio whose slope is the gap below that of u, in float64."""
        return self.conjugate_slope(self.slope(u.double()) - warped.double()).to(u.dtype)

    def response(self, u: Tensor) -> Tensor:
        """1 / f''(u); 0 at 0."""
        return self._responses(u)[0]

    def response_slope(self, u: Tensor) -> Tensor:
        """The derivative of `response`."""
        return self._responses(u)[1]

    def surplus(self, u: Tensor) -> Tensor:
        """f*(f'(u)) + f(0), without f(0) where that is infinite."""
        at = torch.where(u > 0.0, u, 1.0).double()
        above = at * self.slope(at) - self.f(at)
        if math.isfinite(self.at_zero):
            above = torch.where(u > 0.0, above + self.at_zero, 0.0)
        return above.to(u.dtype)

    def pointwise(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """q f(p / q) and its derivative by log q."""
        p, q = log_p.double().exp(), log_q.double().exp()
        inside = (p > 0.0) & (q > 0.0)
        log_ratio = torch.where(inside, log_p.double() - log_q.double(), 0.0)
        u = log_ratio.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()
        value = q * self.f(u)
        by_log_q = value - p * self.slope(u)
        # One of them is 0: q f(0), or p times the slope far out; none where both are.
        at_edge = torch.where(q > 0.0, q * self.at_zero, p * self.sup)
        at_edge = torch.where((p > 0.0) | (q > 0.0), at_edge, 0.0)
        value = torch.where(inside, value, at_edge).clamp(min=0.0)
        far = torch.full((), _LARGEST_LOG, dtype=torch.float64, device=p.device).exp()
        limit = self.f(far) / far - self.slope(far)
        limit = torch.where(limit < -_BEYOND, -math.inf, limit)
        without_q = torch.where(p > 0.0, p * limit, 0.0)
        by_log_q = torch.where(inside, by_log_q, torch.where(q > 0.0, at_edge, without_q))
        return value.to(log_q.dtype), by_log_q.to(log_q.dtype)

    def _responses(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = torch.where(u > 0.0, u, 1.0).detach().double().requires_grad_()
            (curvature,) = torch.autograd.grad(self.slope(at).sum(), at, create_graph=True)
            response = 1.0 / curvature
            slope = torch.zeros_like(at)
            if response.requires_grad:  # a constant is not connected
                (slope,) = torch.autograd.grad(response.sum(), at)
        held = u > 0.0
        return (
            torch.where(held, response.detach(), 0.0).to(u.dtype),
            torch.where(held, slope, 0.0).to(u.dtype),
        )
