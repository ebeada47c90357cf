"""Temporal-difference learning of action values, on a scale that keeps large returns small.

    h(x) = sign(x) (sqrt(|x| + 1) - 1) + e x            the scale on which a network predicts
    G_t  = sum_{i<n} g^i r_{t+i} + g^n h^-1(Q'(s_{t+n}, argmax_a Q(s_{t+n}, a)))
    h(G_t) - Q(s_t, a_t)                                the error that is learned from

An episode that terminates is worth nothing afterwards; one that was truncated would have gone on,
so that the value of the observation it was left in takes the place of what was not seen. Time comes
first: r_t and whether the episode ended there belong to the action a_t taken in s_t.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning"
(R2D2), section 2.3 (n-step double Q targets, priorities); Pohlen et al. 2018, arXiv:1805.11593,
proposition A.2 (h and its inverse); van Hasselt et al. 2016, arXiv:1509.06461 (double Q); Schaul et
al. 2016, arXiv:1511.05952, section 3.4 (importance weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError

__all__ = [
    "double_q_values",
    "importance_weights",
    "n_step_targets",
    "rescale",
    "sequence_losses",
    "sequence_priorities",
    "unscale",
]

EPSILON = 1e-3
"""Slope of h far from 0, which makes it invertible with a bounded slope."""


def rescale(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """h(x), elementwise: odd, increasing, like a square root far from 0 and like x / 2 near it.

    sqrt(|x| + 1) - 1 is computed as |x| / (sqrt(|x| + 1) + 1), which loses no digits near 0.

    Args:
        x: of any shape, floating.
        epsilon: e, at least 0.

    Raises:
        ConfigError: epsilon is negative.
    """
    _refuse_negative(epsilon)
    return x / ((x.abs() + 1.0).sqrt() + 1.0) + epsilon * x


def unscale(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """h^-1(x), elementwise and to a few units in the last place.

    With d = sqrt(|h^-1(x)| + 1) - 1, h says e d^2 + (1 + 2 e) d = |x|. The root is taken in the
    form that subtracts nothing: in the usual one, sqrt(1 + 4 e (|x| + 1 + e)) - 1, half of the
    digits of a float32 cancel.

    Args:
        x: of any shape, floating.
        epsilon: e, at least 0.

    Raises:
        ConfigError: epsilon is negative.
    """
    _refuse_negative(epsilon)
    slope = 1.0 + 2.0 * epsilon
    d = 2.0 * x / (slope + (slope * slope + 4.0 * epsilon * x.abs()).sqrt())
    return d * (d.abs() + 2.0)


def double_q_values(online: Tensor, target: Tensor) -> Tensor:
    """...: what one network thinks of the action that the other one prefers.

    Args:
        online: ... A, values by which the action is chosen.
        target: ... A, values by which it is judged.
    """
    return target.gather(-1, online.argmax(-1, keepdim=True)).squeeze(-1)


def n_step_targets(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    final_values: Tensor,
    *,
    discount: float,
    steps: int,
) -> Tensor:
    """T B: discounted rewards of up to `steps` steps, and the value of where they lead.

    Where fewer steps than that are left, at the end of the sequence, fewer rewards are summed and
    the last value is used. Rewards after an episode's end belong to the next one and do not count.

    Args:
        rewards: T B, r_t of the action taken in s_t.
        terminated: T B bool, that action ended the episode.
        truncated: T B bool, the episode was cut after it; a step that is both has terminated.
        values: T+1 B, of s_0 to s_T, where s_{t+1} after an end is the first of the next episode.
        final_values: T B, of the observation that a truncated episode was left in; not read
            elsewhere.
        discount: g, in [0, 1].
        steps: n, at least 1.

    Raises:
        ConfigError: a number is out of range, or shapes do not belong together.
    """
    if steps < 1 or not 0.0 <= discount <= 1.0:
        raise ConfigError(
            f"n-step targets need steps >= 1 and a discount in [0, 1], got {steps} and {discount}"
        )
    shape = rewards.shape
    others = (terminated.shape, truncated.shape, final_values.shape)
    if any(other != shape for other in others) or values.shape != (shape[0] + 1, *shape[1:]):
        raise ConfigError(
            "rewards, terminated, truncated and final_values are T B and values T+1 B, got "
            f"{[tuple(s) for s in (shape, *others, values.shape)]}"
        )
    ended = torch.where(terminated, torch.zeros_like(final_values), final_values)
    over = terminated | truncated
    found = values
    for _ in range(min(steps, shape[0])):  # one more reward before the value at each turn
        after = torch.where(over, ended, found[1:])
        found = torch.cat([rewards + discount * after, values[-1:]])
    return found[:-1]


def sequence_losses(errors: Tensor, mask: Tensor) -> Tensor:
    """B: half the sum of a sequence's squared errors.

    Args:
        errors: T B, target minus prediction.
        mask: T B bool, what is learned.
    """
    return 0.5 * errors.masked_fill(~mask, 0.0).square().sum(0)


def sequence_priorities(errors: Tensor, mask: Tensor, eta: float = 0.9) -> Tensor:
    """B, no gradient: eta max_t |error| + (1 - eta) mean_t |error|; 0 where nothing is learned.

    Args:
        errors: T B.
        mask: T B bool, the steps that count.
        eta: in [0, 1].

    Raises:
        ConfigError: eta is out of range.
    """
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta of the priorities must lie in [0, 1], got {eta}")
    sizes = errors.detach().abs().masked_fill(~mask, 0.0)
    mean = sizes.sum(0) / mask.sum(0).clamp(min=1)
    return eta * sizes.amax(0) + (1.0 - eta) * mean


def importance_weights(probabilities: Tensor, stored: int, exponent: float = 0.6) -> Tensor:
    """B: (1 / (n P(i)))^exponent over the largest of the batch, which undoes preferential sampling.

    Args:
        probabilities: B, with which each item was drawn, above 0.
        stored: n, how many items there were to draw from.
        exponent: 0 corrects nothing, 1 makes expectations those of uniform sampling.

    Raises:
        ConfigError: the exponent is out of range, or an item could not have been drawn.
    """
    if not 0.0 <= exponent <= 1.0 or stored < 1 or not bool((probabilities > 0.0).all()):
        raise ConfigError(
            "importance weights need an exponent in [0, 1], stored items and probabilities above "
            f"0, got {exponent}, {stored} and a least probability of {probabilities.min():.3g}"
        )
    # By the smallest probability, so that the largest weight is 1 exactly and none overflows.
    return (probabilities.min() / probabilities) ** exponent


def _refuse_negative(epsilon: float) -> None:
    if not epsilon >= 0.0:
        raise ConfigError(f"epsilon of the value rescaling must be at least 0, got {epsilon}")
