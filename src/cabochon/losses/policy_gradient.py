"""The score-function gradient of an expectation over what a policy draws, and its baselines.

For y drawn from the policy, the gradient of E[G(y)] is E[G(y) grad log p(y)]; subtracting from G
what does not depend on y leaves the expectation and lowers the variance.

Where y was drawn from another policy mu, importance ratios p / mu correct for it: whole, which is
unbiased and of high variance; cut from above (truncated); or as PPO has it (clipped), where a
sample stops to teach once the policy has followed it far enough.

Source: Williams 1992, "Simple statistical gradient-following algorithms" (REINFORCE); leave-one-out
means as in Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; clipping as in
Schulman et al. 2017, arXiv:1707.06347, equation 7; k1, k2, k3 as in Schulman 2020, "Approximating
KL Divergence".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cabochon.core import Loss, Prediction, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import linear
from cabochon.losses.f_divergences import KL, ReverseKL
from cabochon.losses.tempering import text_targets

__all__ = [
    "Correction",
    "exact_kl",
    "future_sums",
    "kl_estimates",
    "leave_one_out",
    "logprobs",
    "off_policy_gradient",
    "policy_gradient",
    "standardised",
]


_LARGEST = 40.0
"""Nats of a log-ratio beyond which ratios are not told apart: their squares are still numbers."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How samples of another policy than the one that learns are taken."""

    kind: Literal["none", "truncate", "clip"] = "truncate"
    """As if they were its own; the ratio is cut at `most`; or the gain counts only while the ratio
    stays within 1 +- `clip`, as PPO has it."""
    level: Literal["token", "sequence"] = "token"
    """The ratio of each token (biased by what came before it, of low variance) or of all tokens of
    a row together."""
    most: float = 2.0
    """truncate: the largest ratio; infinity leaves all as they are."""
    clip: float = 0.2

    def __post_init__(self) -> None:
        if not self.most >= 1.0 or not 0.0 < self.clip < 1.0:
            raise ConfigError(
                f"ratios are truncated at 1 or more and clipped within (0, 1), got {self.most} "
                f"and {self.clip}"
            )


def policy_gradient(prediction: Prediction, batch: TokenBatch, gain: Tensor) -> Loss:
    """The sum of -gain log p(target), whose gradient makes targets of positive gain likelier.

    Args:
        prediction: of the distribution that the targets were drawn from (its temperature inside).
        batch: gives targets and mask, B T.
        gain: B T float32, a constant of either sign, of each target: what was got for it.

    Returns:
        The sum, and as weight the number of targets.
    """
    # The divergence from a single token that was drawn is -log of its probability.
    loss = linear.divergence(prediction, text_targets(batch), batch, KL(), weights=gain)
    return Loss(total=loss.total, weight=batch.mask.sum().float())


@torch.no_grad()
def logprobs(prediction: Prediction, batch: TokenBatch) -> Tensor:
    """B T float32, nats: log-probability of each counted target, 0 elsewhere; without gradient."""
    found = torch.zeros(batch.shape, device=batch.mask.device)
    found[batch.mask] = -linear.divergence_values(prediction, text_targets(batch), batch, KL())
    return found


def off_policy_gradient(
    prediction: Prediction, batch: TokenBatch, gain: Tensor, drawn: Tensor, correction: Correction
) -> Loss:
    """`policy_gradient` for targets that another policy drew; ratios above e^40 are taken as that.

    none      `policy_gradient` itself;
    truncate  the sum of -min(ratio, most) gain log p, the ratio a constant;
    clip      the sum of -min(ratio gain, clipped ratio gain), once for each token or each row.

    Args:
        prediction: of the policy as it is now.
        batch: gives targets and mask, B T.
        gain: B T float32, constants; for ratios of rows the same for all tokens of a row.
        drawn: B T float32, nats: log-probability of each target when it was drawn.
        correction: which ratio, and how it is bounded.

    Returns:
        The sum, the number of targets, and sums over the ratios for `rollout_metrics`.
    """
    if correction.kind == "none":
        return policy_gradient(prediction, batch, gain)
    mask, by_row = batch.mask, correction.level == "sequence"
    log_ratio = (logprobs(prediction, batch) - drawn) * mask
    if by_row:
        log_ratio = log_ratio.sum(1, keepdim=True)
    ratio = log_ratio.clamp(max=_LARGEST).exp().expand_as(gain)
    if correction.kind == "truncate":
        factor = ratio.clamp(max=correction.most)
        loss = policy_gradient(prediction, batch, factor * gain * mask)
        outside, total = ratio > correction.most, loss.total
    else:
        bounded = ratio.clamp(1.0 - correction.clip, 1.0 + correction.clip)
        surrogate = torch.minimum(ratio * gain, bounded * gain)
        outside = ratio * gain > bounded * gain
        loss = policy_gradient(prediction, batch, (ratio * gain).masked_fill(outside, 0.0) * mask)
        value = (surrogate[:, 0] if by_row else surrogate * mask).sum()
        total = loss.total + (-value - loss.total.detach())
    units = mask.any(1, keepdim=True) if by_row else mask
    each, out = (x[:, :1] if by_row else x for x in (ratio, outside))
    report = {
        "sum_units": units.sum().float(),
        "sum_ratio": (each * units).sum(),
        "sum_ratio_squared": (each.square() * units).sum(),
        "sum_clipped": (out & units).sum().float(),
    }
    return Loss(total=total, weight=loss.weight, report=report)


def exact_kl(
    prediction: Prediction, anchor: Prediction, batch: TokenBatch
) -> tuple[Tensor, Tensor]:
    """KL(policy || anchor) over the whole vocabulary at each counted position.

    Args:
        prediction: of the policy that drew the targets.
        anchor: gets no gradient.
        batch: gives the mask, B T.

    Returns:
        The sum, whose gradient is that of the KL at the positions there are; and B T, for each
        target the sum of KL at the later positions of its row. The gradient of the KL of whole
        sequences is that of the first, and of `policy_gradient` with minus the second as gain.
    """
    total = linear.divergence(prediction, anchor, batch, ReverseKL()).total
    each = torch.zeros(batch.shape, device=batch.mask.device)
    each[batch.mask] = linear.divergence_values(prediction, anchor, batch, ReverseKL())
    return total, future_sums(each) * batch.mask


def kl_estimates(log_ratio: Tensor) -> Mapping[str, Tensor]:
    """Schulman's estimators of KL(p || q) from log p(x) - log q(x) of draws x of p.

    k1 is unbiased and may be negative; k2 is biased and of low variance; k3 is unbiased and never
    negative. They are for reports: their gradients are not that of the KL.

    Args:
        log_ratio: any shape.
    """
    return {
        "k1": log_ratio,
        "k2": log_ratio.square() / 2,
        "k3": torch.expm1(-log_ratio) + log_ratio,
    }


def leave_one_out(values: Tensor) -> Tensor:
    """Each value minus the mean of the others of its row; exactly 0 where all of a row are equal.

    Args:
        values: ... G.

    Raises:
        ConfigError: there is no value.
    """
    count = values.shape[-1]
    if count == 0:
        raise ConfigError("a baseline needs at least one value")
    exact = values.double()  # in float32 a mean of large values loses what they differ by
    others = (exact.sum(-1, keepdim=True) - exact) / max(1, count - 1)
    return torch.where(_equal(values), 0.0, exact - others).float()


def standardised(values: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Each value minus the mean of its row, over the row's standard deviation plus `epsilon`.

    The deviation is that of a sample (divided by G - 1), as in the implementations of GRPO. Rows of
    equal values, single ones too, give exactly 0: nothing can be learned from them.

    Args:
        values: ... G.
        epsilon: keeps small differences from becoming large ones.
    """
    if values.shape[-1] == 1:
        return torch.zeros_like(values)
    exact = values.double()
    above = (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + epsilon)
    return torch.where(_equal(values), 0.0, above).float()


def _equal(values: Tensor) -> Tensor:
    """Which rows hold one value alone: their mean may differ from it by a rounding."""
    return values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)


def future_sums(values: Tensor) -> Tensor:
    """B T: for each place, the sum of the values of its row that come after it.

    Args:
        values: B T.
    """
    return values.flip(1).cumsum(1).flip(1) - values
