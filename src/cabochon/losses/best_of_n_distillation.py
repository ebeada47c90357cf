"""Best-of-N as something to learn: what draws of a reference say of the reward that leads to it.

With p_<=(y) the probability that a draw of the reference is worth at most what y is, best-of-N is
the optimum of E[r] - KL(. || reference) / (N - 1) for r = log p_<= + log(B) / (N - 1), where B, of
theorem 1, says how equals share what their level gets: between 1 and N, and N everywhere if no two
draws are equal. `cabochon.generation.best_of_n` has the exact quantities on finite spaces.

Source: Sessa et al. 2025, "BOND: Aligning LLMs with Best-of-N Distillation", arXiv:2407.14622,
theorem 1, section 4.1, equations 15 and 17, appendix B.1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cabochon.core.errors import ConfigError, DataError
from cabochon.losses.policy_gradient import leave_one_out

__all__ = [
    "Estimate",
    "Quantile",
    "counted_tilt",
    "jeffreys_gains",
    "learned_tilt",
    "log_level_factor",
    "log_quantile",
    "log_tilt",
    "quantile_loss",
    "reference_divergence",
]

Estimate = Literal["two_draws", "floor", "add_one"]
"""How log p_<= is estimated from c of k draws that are worth at most what y is: `log_quantile`."""

Quantile = Literal["two_draws", "floor", "add_one", "learned"]
"""Counted by an `Estimate`, or learned by `quantile_loss`."""

LOWEST_OF_THREE = -math.log(16.0)
"""Of a y that is worth less than both draws (equation 17)."""


def log_quantile(at_most: Tensor, draws: int, estimate: Estimate) -> Tensor:
    """An estimate of log p_<= in nats; log(c / k) wherever c is not 0, but for `add_one`.

    The logarithm of c = 0 is no number, and the paper does not say what to put in its place:

    - "floor": log of half a draw, 1 / (2 k);
    - "add_one": log (c + 1) / (k + 2), Laplace's rule, for every c;
    - "two_draws": of k = 2 alone, -log 16 for c = 0 and 0 otherwise (J-BOND's reward, equation 17).
      Its mean is -log(16) (1 - p)^2, which is log p at p = 1/2.

    Args:
        at_most: c, any shape: how many of the draws are worth at most what y is.
        draws: k.
        estimate: which of them.

    Returns:
        The shape of `at_most`, float32.

    Raises:
        ConfigError: no such estimate, or one that does not go with so many draws.
        DataError: a count outside 0 to k.
    """
    if estimate not in get_args(Estimate):
        raise ConfigError(f"estimate must be one of {get_args(Estimate)}, got {estimate!r}")
    if draws < 1 or (estimate == "two_draws" and draws != 2):
        raise ConfigError(f"a quantile by {estimate!r} cannot be told from {draws} draws")
    count = at_most.float()
    if bool(((count < 0) | (count > draws)).any()):
        raise DataError(f"of {draws} draws {at_most.flatten().tolist()[:8]} are counted")
    if estimate == "two_draws":
        return torch.where(count == 0, LOWEST_OF_THREE, 0.0)
    if estimate == "add_one":
        return ((count + 1.0) / (draws + 2.0)).log()
    return (count.clamp(min=0.5) / draws).log()


def log_level_factor(below: Tensor, at_most: Tensor, n: int) -> Tensor:
    """log B in nats, from 0 to log n: B = 1 + q + ... + q^(n-1), with q = p_< / p_<=.

    Where nothing is at most y (both are 0), its level was not seen, and B is n: that of a y which
    has no equals.

    Args:
        below: p_<, or how many draws are worth less than y.
        at_most: p_<=, or how many are worth at most what y is; the same shape.
        n: of best-of-N, at least 1.
    """
    unseen = at_most == 0
    ratio = below.float() / at_most.float().masked_fill(unseen, 1.0)
    ratio = ratio.masked_fill(unseen, 1.0)
    total = torch.zeros_like(ratio)
    for power in range(n):
        total = total + ratio**power
    return total.log()


def log_tilt(log_quantile: Tensor, n: int, log_factor: Tensor | None = None) -> Tensor:
    """(N - 1) log p_<= + log B in nats: log of how much likelier best-of-N makes y.

    It is (N - 1) r, with r the reward that leads to best-of-N. With log_ratio = log pi(y) -
    log reference(y) of the whole sequence, equation 15, (N - 1) (r - log_ratio / (N - 1)), is
    log_tilt - log_ratio: -E[(log_tilt - log_ratio) grad log pi(y)], over y of the policy, is the
    gradient of KL(pi || best-of-N), also after a baseline was subtracted from what is in brackets.

    Args:
        log_quantile: log p_<= or an estimate, any shape.
        n: of best-of-N, at least 2.
        log_factor: log B, the same shape; log N, as if there were no equals, where absent.
    """
    if n < 2:
        raise ConfigError(f"best of {n} is the reference itself; n must be at least 2")
    return (n - 1) * log_quantile + (math.log(n) if log_factor is None else log_factor)


def counted_tilt(
    below: Tensor, at_most: Tensor, draws: int, n: int, estimate: Estimate, *, level_factor: bool
) -> tuple[Tensor, Tensor]:
    """The estimate of log p_<= from counts of draws, and the tilt that it gives.

    Args:
        below: any shape: how many draws are worth less than y.
        at_most: how many are worth at most what y is.
        draws: k.
        n: of best-of-N.
        estimate: see `log_quantile`.
        level_factor: whether B counts, estimated from the same draws; two are too few for that.
    """
    log_p = log_quantile(at_most, draws, estimate)
    counts = level_factor and estimate != "two_draws"
    factor = log_level_factor(below, at_most, n) if counts else None
    return log_p, log_tilt(log_p, n, factor)


def learned_tilt(logit: Tensor, draw_at_most: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The learned log p_<=, the tilt that it gives, both without gradient, and the `quantile_loss`.

    Nothing is learned of B, which is N throughout, as if there were no equals.

    Args:
        logit: any shape, of the probability p_<=.
        draw_at_most: see `quantile_loss`.
        n: of best-of-N.
    """
    log_p = functional.logsigmoid(logit.detach().float())
    return log_p, log_tilt(log_p, n), quantile_loss(logit, draw_at_most)


def jeffreys_gains(
    tilt: Tensor,
    log_ratio: Tensor,
    *,
    backward: float,
    regularisation: float = 0.0,
    within_prompt: bool = False,
) -> Tensor:
    """What multiplies -log pi of each sequence, so that the sum descends Jeffreys of a batch.

    With beta `backward`, gamma `regularisation` and expectations over what was drawn, the gradient
    of -sum(gain log pi) is P times that of

        (1 - beta) KL(best-of-N || pi) + beta KL(pi || best-of-N) + gamma KL(pi || reference)

    Algorithm 2 prints gamma's gradient with the opposite sign, which would drive the two apart.

    Args:
        tilt: P G, `log_tilt` of the policy's samples; finite.
        log_ratio: P G nats, log pi - log reference of these; a constant here.
        backward: beta, in [0, 1].
        regularisation: gamma, at least 0.
        within_prompt: the baseline is the mean of the prompt's other samples, not of all others.

    Returns:
        P G+1: of the policy's samples, and last of a draw from best-of-N, which is 1 - beta.

    Raises:
        ConfigError: a sample has no others to be compared with.
    """
    prompts, samples = tilt.shape
    gain = torch.zeros_like(log_ratio)
    for weight, values in ((backward, tilt - log_ratio), (-regularisation, log_ratio)):
        if weight == 0.0:
            continue  # not multiplied by it: what has no part may be infinite
        if (samples if within_prompt else tilt.numel()) < 2:
            raise ConfigError(
                f"{samples} sample of {prompts} prompts has no others to be compared with; draw 2 "
                "or more of a prompt, or take more prompts at a time (batch_size)"
            )
        others = values if within_prompt else values.flatten()
        gain = gain + weight * leave_one_out(others).view_as(values)
    return torch.cat([gain / samples, torch.full_like(gain[:, :1], 1.0 - backward)], dim=1)


def reference_divergence(n: float) -> float:
    """KL(best-of-N || reference) in nats where no two draws are equal; less where some are."""
    return math.log(n) - (n - 1) / n


def quantile_loss(logit: Tensor, draw_at_most: Tensor) -> Tensor:
    """Binary cross-entropy by which sigmoid(logit(y)) becomes p_<=(y) (appendix B.1).

    One draw of the reference for each y is enough: the expected loss is least at the probability.
    Of several draws their share has the same mean, and less noise.

    Args:
        logit: any shape; logsigmoid of it is the learned log p_<=, which needs no floor.
        draw_at_most: the same shape: a draw of the reference is worth at most what y is (bool), or
            the share of several draws that are (in [0, 1]).

    Returns:
        The same shape, nats.
    """
    return functional.binary_cross_entropy_with_logits(
        logit.float(), draw_at_most.float(), reduction="none"
    )
