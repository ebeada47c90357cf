"""Targets that say less than a whole distribution: the likeliest tokens and the tail, or draws.

The k listed tokens and the tail as one more outcome are a coarser view of both distributions, so
by the data-processing inequality the divergence of the k + 1 outcomes is a lower bound of the
whole one; it is 0 where the two agree, never below 0, and exact at k = V. The student's tail is
the sum of what is not listed, never 1 minus a sum, so its logarithm is as good as any other's.

Draws give cross-entropy without bias, at whatever number: -sum_x share(x) log q(x), whose
expectation is -sum_x p(x) log q(x) = KL(p || q) + H(p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import Prediction, SampledTargets, TopKTargets
from cabochon.core.errors import DataError
from cabochon.losses.f_divergences import FDivergence
from cabochon.losses.rows import Counted, RowSoftmax, blocks

__all__ = ["SampledScore", "TopKScore"]

_LN2 = math.log(2.0)
_SLACK = 1e-3
"""Probabilities that a teacher rounded may add up to so much more or less than 1."""


class TopKScore:
    """D_f over the listed tokens and the tail; cross-entropy over them where `f` is None.

    Beside it -log q(target), KL over the same outcomes, and the teacher's probability of the tail.
    """

    size = 4

    def __init__(
        self, student: Prediction, targets: TopKTargets, counted: Counted, f: FDivergence | None
    ) -> None:
        """Reads the counted positions.

        Raises:
            DataError: shapes that do not belong to the batch; nothing said about a counted
                position; ids twice; log-probabilities above 0, NaN, or that do not add up to 1.
        """
        self.softmax = RowSoftmax.of(student)
        self.counted = counted
        self.f = f
        self.ids = _counted_ids(targets.ids, targets.logprob, counted, "logprob")
        device = counted.rows.device
        tail = targets.tail.to(device).flatten()
        if targets.tail.shape != targets.ids.shape[:-1]:
            raise DataError(
                f"tail has shape {tuple(targets.tail.shape)}; ids of {tuple(targets.ids.shape)} "
                f"need {tuple(targets.ids.shape[:-1])}"
            )
        logprob = targets.logprob.to(device).flatten(0, 1)[counted.rows].detach()
        self.log_prob = _checked_log_prob(self.ids, logprob, tail[counted.rows].detach(), counted)

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        ids = self.ids[span]
        _check_ids(ids, raw.shape[-1], self.counted, span.start)
        all_targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_empty(raw.shape[0], self.size, dtype=torch.float64)
        weights = self.counted.factor(span, terms)
        for block in blocks(raw):
            chosen = raw[block]
            inner, exponent = self.softmax.open(chosen)
            targets = all_targets[block]
            at_target = exponent.gather(1, targets).double()
            student = _Coarse.of(exponent, ids[block])
            log_p = self.log_prob[span][block].to(exponent.dtype)
            value, by_log_q, divergence = self._of(log_p, student.log_prob)
            terms[block, 0] = value.sum(-1, dtype=torch.float64)
            terms[block, 1:2] = (student.log2_total.double() - at_target) * _LN2
            terms[block, 2] = divergence.sum(-1, dtype=torch.float64)
            terms[block, 3] = log_p[:, -1].double().exp()
            if gradient:
                scale = torch.full_like(student.log2_total, self.softmax.slope)
                if weights is not None:
                    scale *= weights[block]
                self.softmax.close(student.by_logit(by_log_q), inner, chosen, scale)
        if weights is not None:
            terms *= weights
        return terms

    def _of(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(values, their derivatives by log q, KL) of the outcomes, n k+1 each."""
        prob = log_p.exp()
        gone = log_p == -math.inf
        divergence = (prob * (log_p - log_q)).masked_fill(gone, 0.0)
        if self.f is None:
            return -(prob * log_q).masked_fill(gone, 0.0), -prob, divergence
        value, by_log_q = self.f.pointwise(log_p, log_q)
        return value, by_log_q.masked_fill(log_q == -math.inf, 0.0), divergence


class SampledScore:
    """-sum_x share(x) log q(x), with -log q(target) beside it."""

    size = 2

    def __init__(self, student: Prediction, targets: SampledTargets, counted: Counted) -> None:
        """Reads the counted positions.

        Raises:
            DataError: shapes that do not belong to the batch; nothing said about a counted
                position; shares that are negative, NaN, or do not add up to 1.
        """
        self.softmax = RowSoftmax.of(student)
        self.counted = counted
        self.ids = _counted_ids(targets.ids, targets.share, counted, "share")
        share = targets.share.to(counted.rows.device).flatten(0, 1)[counted.rows].detach()
        listed = self.ids >= 0
        counted.refuse((share == 0.0).all(-1), "the teacher drew no token")
        counted.refuse(
            ~(share >= 0.0).all(-1), "the shares of the teacher's draws are below 0 or NaN"
        )
        counted.refuse(((share > 0.0) & ~listed).any(-1), "shares of draws have no token (id -1)")
        total = share.sum(-1, keepdim=True, dtype=torch.float64)
        wrong = ((total - 1.0).abs() > _SLACK).squeeze(-1)
        counted.refuse(wrong, "the shares of the teacher's draws do not add up to 1")
        self.share = share / total

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        ids = self.ids[span]
        _check_ids(ids, raw.shape[-1], self.counted, span.start)
        ids = ids.clamp(min=0)
        all_targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_empty(raw.shape[0], self.size, dtype=torch.float64)
        weights = self.counted.factor(span, terms)
        for block in blocks(raw):
            chosen, drawn = raw[block], ids[block]
            inner, exponent = self.softmax.open(chosen)
            power, total = self.softmax.powers(exponent)
            log_total = total.double().log2()
            share = self.share[span][block]
            log_prob = exponent.gather(1, drawn).double() - log_total
            terms[block, 0] = (share * log_prob).masked_fill(share == 0.0, 0.0).sum(-1) * -_LN2
            targets = all_targets[block]
            terms[block, 1:] = (log_total - exponent.gather(1, targets)) * _LN2
            if gradient:
                by_logit = power.div_(total)
                by_logit.scatter_add_(1, drawn, -share.to(power.dtype))
                scale = torch.full_like(total, self.softmax.slope)
                if weights is not None:
                    scale *= weights[block]
                self.softmax.close(by_logit, inner, chosen, scale)
        if weights is not None:
            terms *= weights
        return terms


@dataclass(frozen=True)
class _Coarse:
    """A student's distribution over listed tokens and the tail, and the way back to all tokens."""

    places: tuple[Tensor, Tensor]
    """(rows, columns) of the listed tokens among ids, flat."""
    tokens: Tensor
    """Which tokens stand there, flat int64."""
    log_prob: Tensor
    """n k+1, nats; -inf where an id is absent, or the outcome impossible."""
    log2_total: Tensor
    """n 1: log2 of the sum of 2 ** exponent over all tokens."""
    power: Tensor
    """n V: proportional to the probabilities of the tail's tokens, 0 at the listed ones."""
    power_total: Tensor
    """n 1."""

    @staticmethod
    def of(exponent: Tensor, ids: Tensor) -> _Coarse:
        """Of rows with probability proportional to 2 ** exponent (n V), which is written over."""
        listed = ids >= 0
        rows, columns = listed.nonzero(as_tuple=True)
        tokens = ids[rows, columns]
        own = exponent.gather(1, ids.clamp(min=0)).masked_fill_(~listed, -math.inf)
        exponent.index_put_((rows, tokens), exponent.new_tensor(-math.inf))
        # The tail has its own highest exponent: it may be far below the listed ones, and is no
        # less exact for that.
        highest = exponent.amax(-1, keepdim=True)
        highest = highest.masked_fill(highest == -math.inf, 0.0)
        power = exponent.sub_(highest).exp2_()
        power_total = power.sum(-1, keepdim=True)
        outcomes = torch.cat([own, power_total.log2() + highest], -1)
        log2_total = torch.logsumexp(outcomes * _LN2, -1, keepdim=True) / _LN2
        log_prob = (outcomes - log2_total) * _LN2
        return _Coarse((rows, columns), tokens, log_prob, log2_total, power, power_total)

    def by_logit(self, by_log_prob: Tensor) -> Tensor:
        """n V: the derivative by the logits, over the memory of `power`."""
        by_outcome = by_log_prob - self.log_prob.exp() * by_log_prob.sum(-1, keepdim=True)
        spread = by_outcome[:, -1:] / self.power_total.masked_fill(self.power_total == 0.0, 1.0)
        by_logit = self.power.mul_(spread)
        rows, columns = self.places
        return by_logit.index_put_((rows, self.tokens), by_outcome[rows, columns])


def _counted_ids(ids: Tensor, beside: Tensor, counted: Counted, name: str) -> Tensor:
    """n k: the ids of the counted positions."""
    if ids.ndim != 3 or ids.shape[:2] != counted.shape or ids.is_floating_point():
        raise DataError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)}; expected one list of whole numbers "
            f"for each of the batch's {counted.shape} positions"
        )
    if beside.shape != ids.shape:
        raise DataError(f"ids have shape {tuple(ids.shape)}, {name} {tuple(beside.shape)}")
    own = ids.to(counted.rows.device).flatten(0, 1)[counted.rows].long()
    counted.refuse((own < -1).any(-1), "the teacher names tokens below -1 (-1 is an absent one)")
    return own


def _check_ids(ids: Tensor, vocabulary: int, counted: Counted, start: int) -> None:
    wrong = (ids >= vocabulary).any(-1)
    if bool(wrong.any()):
        counted.refuse(
            wrong,
            f"the teacher names token {int(ids.max())}, the student predicts {vocabulary}: "
            "another tokenizer? It does so",
            start,
        )


def _checked_log_prob(ids: Tensor, logprob: Tensor, tail: Tensor, counted: Counted) -> Tensor:
    """n k+1: log-probabilities of the outcomes, which add up to 1; the tail is the last."""
    counted.refuse(tail.isnan(), "the teacher says nothing (its tail is NaN)")
    listed = ids >= 0
    ordered = torch.where(listed, ids, -1 - torch.arange(ids.shape[1], device=ids.device))
    ordered = ordered.sort(-1).values
    counted.refuse((ordered.diff(dim=-1) == 0).any(-1), "the teacher lists a token twice")
    log_prob = torch.cat([logprob.masked_fill(~listed, -math.inf), tail[:, None]], -1)
    log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
    counted.refuse(log_prob.isnan().any(-1), "the teacher's log-probabilities are NaN")
    counted.refuse(
        (log_prob > _SLACK).any(-1),
        "the teacher's log-probabilities are above 0, not nats of a probability,",
    )
    total = log_prob.double().logsumexp(-1, keepdim=True)
    counted.refuse(
        (total.expm1().abs() > _SLACK).squeeze(-1),
        "the teacher's listed probabilities and their tail do not add up to 1",
    )
    return (log_prob.double() - total).to(log_prob.dtype)
