"""Losses on pairs of which one is preferred: Bradley-Terry, and DPO with any f-divergence.

Both say that the first of two answers is preferred with probability sigmoid(its score minus the
other's). Bradley-Terry learns the scores; DPO takes for score what a policy has gained over its
reference: where the reward r is to be maximised less `strength` times D_f(policy, reference), the
optimum satisfies r = strength f'(policy / reference) + what is the same for all answers of the
prompt, so that a policy is its own reward model.

    forward_kl   log u                DPO; KL(policy || reference)
    reverse_kl   1 - 1 / u            KL(reference || policy)
    jsd          log(u / m) / (1 - beta), m = beta u + 1 - beta
    alpha        (u^(a-1) - 1) / (a - 1)

with u = policy / reference, of whole sequences: log u is the sum over the tokens, never their mean.
The names are those of `f_divergences`, in which p is the policy and q the reference.

Source: Bradley and Terry 1952; Rafailov et al. 2023, arXiv:2305.18290, section 4 (DPO); Wang et al.
2024, arXiv:2309.16240, theorem 1 (f-DPO); Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cabochon.core.errors import ConfigError, DataError
from cabochon.losses.f_divergences import (
    KL,
    Alpha,
    ChiSquare,
    FDivergence,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SquaredHellinger,
)

__all__ = ["bradley_terry", "dpo", "gained", "preference_probability"]


def bradley_terry(chosen: Tensor, rejected: Tensor, *, centre: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected), in nats, of each pair.

    Args:
        chosen: n, scores of the preferred answers.
        rejected: n, of the others.
        centre: how much of (chosen + rejected)^2 is added: it holds the scores near 0, which the
            preferences leave undetermined.

    Returns:
        n, in float32 or wider.

    Raises:
        DataError: the shapes differ.
    """
    _check(chosen, rejected)
    chosen, rejected = _wide(chosen), _wide(rejected)
    loss = -logsigmoid(chosen - rejected)
    return loss + centre * (chosen + rejected).square() if centre else loss


def preference_probability(chosen: Tensor, rejected: Tensor) -> Tensor:
    """sigmoid(chosen - rejected): how likely the first is preferred to the second."""
    return (_wide(chosen) - _wide(rejected)).sigmoid()


def dpo(chosen: Tensor, rejected: Tensor, strength: float, f: FDivergence | None = None) -> Tensor:
    """-log sigmoid(strength (f'(u_chosen) - f'(u_rejected))), in nats, of each pair.

    Args:
        chosen: n, log(policy / reference) of the preferred answers, summed over their tokens.
        rejected: n, of the others.
        strength: of the divergence from the reference; beta in the paper. Above 0.
        f: which divergence D_f(policy, reference) holds the policy; KL(policy || reference), that
            of DPO, when absent.

    Returns:
        n, in float32 or wider.

    Raises:
        ConfigError: `strength` is not above 0.
        DataError: the shapes differ.
    """
    _check(chosen, rejected)
    if not strength > 0.0:
        raise ConfigError(f"the strength of the divergence must be above 0, got {strength}")
    margin = gained(chosen, f) - gained(rejected, f)
    return -logsigmoid(strength * margin)


def gained(log_ratio: Tensor, f: FDivergence | None = None) -> Tensor:
    """f'(u) at log u: what a unit of divergence strength makes of it is the implicit reward.

    It is taken at log u and not at u, which overflows for whole sequences; an f of the user's own
    is asked at u, in float64.

    Args:
        log_ratio: any shape, log(policy / reference).
        f: which divergence; KL(policy || reference) when absent.
    """
    x = _wide(log_ratio)
    match f:
        case None | KL():
            return x
        case ReverseKL():
            return -(-x).expm1()
        case JensenShannon(beta=beta):
            return f.scale * _mixture_slope(x, beta)
        case Alpha(a=a):
            return x if a == 1.0 else ((a - 1.0) * x).expm1() / (a - 1.0)
        case SquaredHellinger():
            return -(-0.5 * x).expm1()
        case ChiSquare():
            return x.expm1()
        case Jeffreys():
            return x - (-x).expm1()
        case _:
            return f.slope(x.double().exp()).to(x.dtype)


def _mixture_slope(x: Tensor, beta: float) -> Tensor:
    """log(u / m) / (1 - beta), with m = beta u + 1 - beta."""
    if beta == 0.0:
        return x
    if beta == 1.0:  # the limit, KL(q || p)
        return -(-x).expm1()
    mixed = torch.logaddexp(
        x + torch.tensor(beta, dtype=x.dtype, device=x.device).log(),
        torch.tensor(1.0 - beta, dtype=x.dtype, device=x.device).log(),
    )
    return (x - mixed) / (1.0 - beta)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape:
        raise DataError(
            f"{tuple(chosen.shape)} preferred answers and {tuple(rejected.shape)} others; a pair "
            "has one of each"
        )
