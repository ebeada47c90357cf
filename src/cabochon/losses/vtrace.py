"""V-trace: value targets and advantages for a policy that did not act itself.

Everything is time-major: T transitions of B environments. With rho_t = pi(a_t) / mu(a_t),
crho_t = min(rho_bar, rho_t) and c_t = lambda min(c_bar, rho_t),

    delta_t = crho_t (r_t + gamma_t V_{t+1} - V_t)
    v_t     = V_t + delta_t + gamma_t c_t (v_{t+1} - V_{t+1}),      v_T = V_T
    adv_t   = min(rho_bar_pg, rho_t) (r_t + gamma_t v_{t+1} - V_t)

The targets' fixed point is the value not of pi but of the policy proportional to
min(rho_bar mu, pi); c_bar changes how fast it is reached, and nothing else.

Source: Espeholt et al. 2018 (IMPALA), arXiv:1802.01561, section 4.1 and equation 1. The advantage
takes V_t as its baseline, as theirs does, and no lambda-mixture of later values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError

__all__ = ["VTrace", "vtrace"]


class VTrace(NamedTuple):
    """What V-trace says of T transitions; constants, without a gradient."""

    targets: Tensor
    """T B float32: v_t, which the value V_t is drawn to."""
    advantages: Tensor
    """T B float32: what log pi(a_t) is multiplied by."""


@torch.no_grad()
def vtrace(
    log_rhos: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    *,
    trace: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    rho_bar_advantage: float = 1.0,
) -> VTrace:
    """The corrected value targets and advantages, in float32.

    Where an episode was cut short rather than ended, the value of its final observation belongs in
    the reward of its last transition, r_t + gamma V(final), and the discount there is 0.

    Args:
        log_rhos: T B: log pi(a_t) - log mu(a_t), nats.
        rewards: T B: r_t, that action t brought.
        discounts: T B: gamma_t, 0 for the last transition of an episode.
        values: T B: V_t, of the observation that action t was taken in.
        bootstrap: B: V_T, of the observation after the last transition.
        trace: lambda: 1 looks ahead to the end of the T transitions, 0 one transition.
        rho_bar: bounds the ratios in the targets' own errors; `math.inf` for none.
        c_bar: bounds the ratios that carry later errors back.
        rho_bar_advantage: bounds the ratios of the advantages.

    Raises:
        ConfigError: shapes differ, T is 0, or a bound or lambda is out of range.
    """
    _refuse(trace, rho_bar, c_bar, rho_bar_advantage)
    shapes = [tuple(each.shape) for each in (log_rhos, rewards, discounts, values)]
    if log_rhos.ndim != 2 or len(set(shapes)) > 1 or tuple(bootstrap.shape) != shapes[0][1:]:
        raise ConfigError(
            f"V-trace takes T B log_rhos, rewards, discounts and values and a bootstrap of B, "
            f"got {shapes} and {tuple(bootstrap.shape)}"
        )
    if len(log_rhos) == 0:
        raise ConfigError("V-trace needs at least one transition, got none")
    rhos = log_rhos.float().exp()
    rewards, discounts = rewards.float(), discounts.float()
    values, bootstrap = values.float(), bootstrap.float()
    following = torch.cat([values[1:], bootstrap[None]])
    errors = rhos.clamp(max=rho_bar) * (rewards + discounts * following - values)
    carried = discounts * trace * rhos.clamp(max=c_bar)
    correction = torch.zeros_like(bootstrap)
    corrections = torch.empty_like(values)
    for t in range(len(values) - 1, -1, -1):
        correction = errors[t] + carried[t] * correction
        corrections[t] = correction
    targets = values + corrections
    later = torch.cat([targets[1:], bootstrap[None]])
    bounded = rhos if math.isinf(rho_bar_advantage) else rhos.clamp(max=rho_bar_advantage)
    return VTrace(targets, bounded * (rewards + discounts * later - values))


def _refuse(trace: float, rho_bar: float, c_bar: float, rho_bar_advantage: float) -> None:
    if not 0.0 <= trace <= 1.0:
        raise ConfigError(f"lambda must lie in [0, 1], got {trace}")
    if not (min(rho_bar, c_bar, rho_bar_advantage) >= 0.0 and rho_bar >= c_bar * (rho_bar > 0)):
        raise ConfigError(
            "the bounds of the ratios must not be negative, and rho_bar not below c_bar (or the "
            f"targets need not converge); got rho_bar {rho_bar}, c_bar {c_bar}, "
            f"rho_bar_advantage {rho_bar_advantage}"
        )
