"""D_f between what teacher and student give to groups of tokens, as two outcomes each.

A student's probability of a group is the product over its tokens, Q = prod q. The outcomes are the
group and everything else: D_f = Q f(P / Q) + (1 - Q) f((1 - P) / (1 - Q)). Whatever finer events
P and Q are sums of, by the data-processing inequality this is at most their divergence. Groups are
counted by their tokens: the mean is one of nats a token, and sums over a text add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cabochon.core import GroupTargets, Loss, Prediction, TokenBatch
from cabochon.core.errors import DataError
from cabochon.losses.f_divergences import KL, FDivergence
from cabochon.losses.rows import Counted, row_sums, row_terms
from cabochon.losses.targets import SampledScore
from cabochon.losses.tempering import text_targets

__all__ = ["group_divergence", "group_values"]

_LEAST_REST = -(2.0**-24)
"""log Q above which float32 logits do not tell 1 - Q from 0: a log of it would be made up."""


def group_divergence(
    student: Prediction,
    targets: GroupTargets,
    batch: TokenBatch,
    f: FDivergence | None,
    *,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Loss:
    """Summed D_f of the groups; their cross-entropy where `f` is None.

    Args:
        student: predictions of the positions of `batch`.
        targets: the teacher's groups; positions without one, and groups with a position that does
            not count, have no part.
        batch: gives targets and mask, B T.
        f: any f-divergence.
        weights: B T; a group's term is multiplied by their mean over its positions.
        chunk: rows whose logits exist at once.

    Returns:
        The sum; as weight that of the positions in groups (their number where no weights are
        given); and, summed likewise, ``kl`` of the two outcomes, ``nll`` of the student's tokens,
        and ``groups``, how many there are.

    Raises:
        DataError: log-probabilities above 0 or NaN; shapes that do not belong to the batch.
    """
    found = _Groups.of(targets, batch, weights)
    log_q = found.student(student, chunk)
    with torch.no_grad():
        value, by_log_q, kl = _compared(found.log_p, log_q, f)
        factor = found.factor
        total, kl = (value * factor).sum(), (kl * factor).sum()
        by_position = (by_log_q * factor)[found.group]
    # The gradient of sum_g c_g log Q_g, with c the derivatives, is that of weighted tokens.
    surrogate = found.weighted_nll(student, -by_position, chunk)
    each = torch.ones_like(by_position) if found.weights is None else found.weights
    nll = -(found.by_token * each).sum()
    return Loss(
        total=surrogate - surrogate.detach() + total.to(surrogate.dtype),
        weight=each.sum().float(),
        report={"kl": kl.float(), "nll": nll.float(), "groups": factor.sum().float()},
    )


def group_values(
    student: Prediction,
    targets: GroupTargets,
    batch: TokenBatch,
    f: FDivergence,
    *,
    chunk: int | None = None,
) -> Tensor:
    """n float32: for each counted position D_f of the group that begins there, 0 elsewhere."""
    found = _Groups.of(targets, batch, None)
    value, _, _ = _compared(found.log_p, found.student(student, chunk), f)
    every = torch.zeros(batch.mask.numel(), device=value.device)
    places = torch.full((len(value),), batch.mask.numel(), device=value.device)
    places.scatter_reduce_(0, found.group, found.counted.rows, "amin")
    every[places] = value.float()
    return every[batch.mask.flatten()]


@dataclass
class _Groups:
    """The groups of a batch that count, numbered anew."""

    batch: TokenBatch
    """Its mask is True in groups alone."""
    counted: Counted
    group: Tensor
    """n int64: of each position in a group."""
    log_p: Tensor
    """g float64."""
    weights: Tensor | None
    """n float64: of the positions."""
    by_token: Tensor
    """n float64: the student's log q, once it was asked."""

    @staticmethod
    def of(targets: GroupTargets, batch: TokenBatch, weights: Tensor | None) -> _Groups:
        if targets.group.shape != batch.mask.shape:
            raise DataError(
                f"groups have shape {tuple(targets.group.shape)}; the batch has "
                f"{tuple(batch.mask.shape)} positions"
            )
        device = batch.mask.device
        group, log_p = targets.group.to(device), targets.logprob.to(device).double()
        if bool((group >= len(log_p)).any()) or not bool((log_p <= 1e-3).all()):
            raise DataError(
                "the teacher's groups have log-probabilities that are NaN or above 0, or none"
            )
        cut = torch.zeros(len(log_p), dtype=torch.bool, device=device)
        cut[group[(group >= 0) & ~batch.mask]] = True
        inside = (group >= 0) & batch.mask
        inside[inside.clone()] &= ~cut[group[inside]]
        numbers, renumbered = group[inside].unique(return_inverse=True)
        own = replace(batch, mask=inside)
        counted = Counted.of(own, weights)
        each = None if counted.weights is None else counted.weights.double()
        return _Groups(own, counted, renumbered, log_p[numbers].clamp(max=0.0), each, log_p[:0])

    @property
    def factor(self) -> Tensor:
        """g: the mean weight of a group's positions."""
        if self.weights is None:
            return torch.ones_like(self.log_p)
        ones = torch.ones_like(self.weights)
        return self.summed(self.weights) / self.summed(ones)

    def summed(self, values: Tensor) -> Tensor:
        """g: of n values, one for each position."""
        return torch.zeros_like(self.log_p).index_add_(0, self.group, values)

    def student(self, student: Prediction, chunk: int | None) -> Tensor:
        """g: log Q, without a gradient."""
        with torch.no_grad():
            plain = replace(self.counted, weights=None)
            score = SampledScore(student, text_targets(self.batch), plain)
            self.by_token = -row_terms(student, plain.rows, score, chunk)[:, 0]
        return self.summed(self.by_token)

    def weighted_nll(self, student: Prediction, weights: Tensor, chunk: int | None) -> Tensor:
        """The sum of -w log q over the positions."""
        weighted = replace(self.counted, weights=weights)
        score = SampledScore(student, text_targets(self.batch), weighted)
        return row_sums(student, weighted.rows, score, chunk)[0]


def _compared(log_p: Tensor, log_q: Tensor, f: FDivergence | None) -> tuple[Tensor, Tensor, Tensor]:
    """(D_f or the cross-entropy, its derivative by log Q, KL) of each group."""
    log_q = log_q.clamp(max=_LEAST_REST)
    p = torch.stack([log_p, _log_rest(log_p)], -1)
    q = torch.stack([log_q, _log_rest(log_q)], -1)
    kl, by_q = KL().pointwise(p, q)
    kl_total = kl.sum(-1)
    if f is None:
        entropy = -(p.exp() * p.masked_fill(p == -math.inf, 0.0)).sum(-1)
        value = kl_total + entropy
    else:
        parts, by_q = f.pointwise(p, q)
        value = parts.sum(-1)
    by_log_q = by_q[:, 0] - by_q[:, 1] * (q[:, 0] - q[:, 1]).exp()
    return value, by_log_q, kl_total


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p)."""
    near_one = torch.log(-torch.expm1(log_p))
    return torch.where(log_p > -math.log(2.0), near_one, torch.log1p(-log_p.exp()))
