"""The score-function gradient of an expectation over what a policy draws, and its baselines.

For y drawn from the policy, the gradient of E[G(y)] is E[G(y) grad log p(y)]; subtracting from G
what does not depend on y leaves the expectation and lowers the variance.

Source: Williams 1992, "Simple statistical gradient-following algorithms" (REINFORCE); leave-one-out
means as in Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.core import Loss, Prediction, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import linear
from cabochon.losses.f_divergences import KL
from cabochon.losses.tempering import text_targets

__all__ = ["future_sums", "leave_one_out", "policy_gradient", "standardised"]


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
    others = (values.sum(-1, keepdim=True) - values) / max(1, count - 1)
    return torch.where(_equal(values), 0.0, values - others)


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
    spread = values.std(-1, keepdim=True)
    above = (values - values.mean(-1, keepdim=True)) / (spread + epsilon)
    return torch.where(_equal(values), 0.0, above)


def _equal(values: Tensor) -> Tensor:
    """Which rows hold one value alone: their mean may differ from it by a rounding."""
    return values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)


def future_sums(values: Tensor) -> Tensor:
    """B T: for each place, the sum of the values of its row that come after it.

    Args:
        values: B T.
    """
    return values.flip(1).cumsum(1).flip(1) - values
