"""Losses over large vocabularies that never hold the logits of all rows at once.

Only positions that count are unembedded. `cabochon.losses.rows` says how.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cabochon.core import (
    GroupTargets,
    Loss,
    Prediction,
    SampledTargets,
    TokenBatch,
    TopKTargets,
)
from cabochon.core.errors import ConfigError
from cabochon.losses.divergences import DivergenceScore, TeacherRows, is_forward_kl
from cabochon.losses.f_divergences import KL, FDivergence
from cabochon.losses.groups import group_divergence, group_values
from cabochon.losses.rows import Counted, RowScore, RowSoftmax, blocks, row_sums, row_terms
from cabochon.losses.targets import SampledScore, TopKScore

__all__ = ["cross_entropy", "distillation", "divergence", "divergence_values"]


def cross_entropy(prediction: Prediction, batch: TokenBatch, *, chunk: int | None = None) -> Loss:
    """Summed -log p(target) in nats over the positions whose mask is True.

    Args:
        prediction: of the positions of `batch`. A `LinearPrediction` is unembedded in row chunks
            with a hand-written gradient; any other is asked for its logits chunk by chunk, and
            again in the backward pass.
        batch: gives targets and mask, B T.
        chunk: rows whose logits exist at once; it changes nothing but speed and memory. By
            default as many as make about 16 million logits.

    Returns:
        The sum, and as weight the number of targets. No target: a sum of 0 with zero gradients.

    Raises:
        DataError: a counted target is not in the vocabulary.
        ConfigError: `chunk` is not positive.
    """
    counted = Counted.of(batch)
    counted.refuse_other_positions(prediction, "model")
    sums = row_sums(prediction, counted.rows, _TargetScore(prediction, counted), chunk)
    return Loss(total=sums[0], weight=counted.weight)


def distillation(
    student: Prediction,
    target: Prediction | TopKTargets | SampledTargets | GroupTargets,
    batch: TokenBatch,
    *,
    chunk: int | None = None,
) -> Loss:
    """Summed cross-entropy -sum_x p_T(x) log p_S(x) to the teacher's distribution, in nats.

    Its gradient is that of KL(p_T || p_S), from which it differs by the teacher's entropy.
    Soft-caps and temperatures of both are inside their distributions. The teacher is a constant:
    it gets no gradient, and may have another width than the student.

    Args:
        student: predictions of the positions of `batch`; as in `cross_entropy`.
        target: what the teacher says of the same positions, over the same vocabulary: its whole
            distribution, its likeliest tokens and the tail (the tail is one outcome), or draws
            (an unbiased estimate of the whole); or, of another vocabulary, groups of tokens
            (`losses.groups`, which says what is counted then).
        batch: gives the mask (and the targets of the report), B T.
        chunk: rows whose logits exist at once, as in `cross_entropy`.

    Returns:
        The sum, the number of positions, and further sums over them: ``nll``, the student's
        -log p_S(target), comparable with `cross_entropy`; ``kl``, KL(p_T || p_S), which is 0 where
        student and teacher agree and positive elsewhere (of the listed tokens and the tail, a
        lower bound; draws have none); ``tail``, the teacher's probability of tokens not listed.

    Raises:
        TokenizerMismatch: student and teacher have vocabularies of different sizes.
        DataError: a counted target is not in the vocabulary; what the teacher says of a counted
            position is missing or no distribution.
        ConfigError: `chunk` is not positive.

    Source: Gemma 2 report, arXiv:2408.00118, section 3.1.
    """
    if isinstance(target, GroupTargets):
        return group_divergence(student, target, batch, None, chunk=chunk)
    counted = _counted(student, target, batch)
    score: RowScore
    names: tuple[str, ...]
    if isinstance(target, TopKTargets):
        score, names = TopKScore(student, target, counted, None), ("nll", "kl", "tail")
    elif isinstance(target, SampledTargets):
        score, names = SampledScore(student, target, counted), ("nll",)
    else:
        score, names = _TeacherScore(student, target, counted), ("kl", "nll")
    sums = row_sums(student, counted.rows, score, chunk)
    return Loss(total=sums[0], weight=counted.weight, report=_report(names, sums))


def divergence(
    student: Prediction,
    target: Prediction | TopKTargets | SampledTargets | GroupTargets,
    batch: TokenBatch,
    f: FDivergence,
    *,
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Loss:
    """Summed D_f(p_T, p_S) = sum_x p_S(x) f(p_T(x) / p_S(x)), in nats for the KLs and their mixes.

    Soft-caps and temperatures of both are inside their distributions. The teacher is a constant.
    Logits of -inf are probabilities of 0; a divergence that is infinite there is inf.

    Args:
        student: predictions of the positions of `batch`; as in `cross_entropy`.
        target: what the teacher says of the same positions, over the same vocabulary:

            - its whole distribution, as a prediction: the divergence, exactly;
            - its likeliest tokens and the tail: the divergence of those k + 1 outcomes, a lower
              bound of the whole one that is exact where k is the vocabulary;
            - draws: for KL(p_T || p_S) alone, an unbiased estimate of its cross-entropy, which
              exceeds it by the teacher's entropy and has the same gradient;
            - of another vocabulary, groups of tokens: see `losses.groups`.
        batch: gives the mask (and the targets of the report), B T.
        f: any object of `cabochon.losses.f_divergences`, or with its `pointwise`.
        weights: B T, what multiplies each counted position's terms; 1 where absent. A weight of 0
            leaves the position out. With 1 / (tokens of its sequence) the mean is one of sequences
            instead of tokens.
        chunk: rows whose logits exist at once, as in `cross_entropy`.

    Returns:
        The weighted sum; as weight the sum of the weights (the number of positions where there are
        none); and, weighted likewise, ``nll``, the student's -log p_S(target), and for likeliest
        tokens ``kl`` and ``tail`` as in `distillation`.

    Raises:
        TokenizerMismatch: student and teacher have vocabularies of different sizes.
        DataError: a counted target is not in the vocabulary; what the teacher says of a counted
            position is missing, NaN or no distribution; weights of another shape or not finite.
        ConfigError: `chunk` is not positive; draws with another f than KL(p_T || p_S).
    """
    if isinstance(target, GroupTargets):
        return group_divergence(student, target, batch, f, weights=weights, chunk=chunk)
    counted = _counted(student, target, batch, weights)
    score, names = _divergence_score(student, target, counted, f)
    sums = row_sums(student, counted.rows, score, chunk)
    return Loss(total=sums[0], weight=counted.weight, report=_report(names, sums))


def divergence_values(
    student: Prediction,
    target: Prediction | TopKTargets | SampledTargets | GroupTargets,
    batch: TokenBatch,
    f: FDivergence,
    *,
    chunk: int | None = None,
) -> Tensor:
    """n float32: what `divergence` sums, for each counted position in order, without gradient.

    Of a group of tokens the first position has all. Arguments and errors are those of `divergence`.
    """
    if isinstance(target, GroupTargets):
        return group_values(student, target, batch, f, chunk=chunk)
    counted = _counted(student, target, batch)
    score, _ = _divergence_score(student, target, counted, f)
    return row_terms(student, counted.rows, score, chunk)[:, 0].float()


def _counted(
    student: Prediction, target: object, batch: TokenBatch, weights: Tensor | None = None
) -> Counted:
    if weights is not None and weights.shape == batch.mask.shape:
        # Left out rather than multiplied: 0 times a divergence of inf would be NaN.
        batch = replace(batch, mask=batch.mask & (weights != 0.0).to(batch.mask.device))
    counted = Counted.of(batch, weights)
    counted.refuse_other_positions(student, "student")
    counted.refuse_other_positions(target, "teacher")
    return counted


def _divergence_score(
    student: Prediction,
    target: Prediction | TopKTargets | SampledTargets,
    counted: Counted,
    f: FDivergence,
) -> tuple[RowScore, tuple[str, ...]]:
    """The score, and the names of its terms after the first."""
    if isinstance(f, str):
        raise ConfigError(f"f is an object, got the word {f!r}: f_divergences.named gives it")
    if isinstance(target, TopKTargets):
        return TopKScore(student, target, counted, f), ("nll", "kl", "tail")
    if not isinstance(target, SampledTargets):
        return DivergenceScore(student, target, counted, f), ("nll",)
    if not is_forward_kl(f):
        raise ConfigError(
            f"draws from the teacher cannot estimate {f.name}: it needs the probabilities of all "
            "tokens, not only of those drawn; they estimate the cross-entropy of forward_kl alone. "
            "Use a teacher that gives its likeliest tokens or its whole distribution"
        )
    return SampledScore(student, target, counted), ("nll",)


def _report(names: tuple[str, ...], sums: Tensor) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in zip(names, sums[1:], strict=True)}


class _TargetScore:
    """-log p(target)."""

    size = 1

    def __init__(self, prediction: Prediction, counted: Counted) -> None:
        self.softmax = RowSoftmax.of(prediction)
        self.counted = counted

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_empty(raw.shape[0], self.size, dtype=torch.float64)
        softmax = self.softmax
        for block in blocks(raw):
            chosen, wanted = raw[block], targets[block]
            inner, exponent = softmax.open(chosen)
            at_target = exponent.gather(1, wanted)
            power = exponent.exp2_()
            total = power.sum(-1, keepdim=True)
            terms[block] = total.log() - at_target * math.log(2.0)
            if gradient:
                power.mul_(softmax.slope / total)
                power.scatter_add_(1, wanted, power.new_full(wanted.shape, -softmax.slope))
                softmax.close(power, inner, chosen)
        return terms


class _TeacherScore:
    """-sum_x p_T(x) log p_S(x), with KL(p_T || p_S) and -log p_S(target) beside it."""

    size = 3

    def __init__(self, student: Prediction, teacher: Prediction, counted: Counted) -> None:
        self.softmax = RowSoftmax.of(student)
        self.teacher = TeacherRows(teacher)
        self.counted = counted

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_empty(raw.shape[0], self.size, dtype=torch.float64)
        teacher_raw = self.teacher.raw(self.counted.rows[span], raw)
        softmax = self.softmax
        for block in blocks(raw):
            chosen = raw[block]
            _, teacher_exponent = self.teacher.softmax.open(teacher_raw[block])
            prob, teacher_total = self.teacher.softmax.powers(teacher_exponent)
            prob.div_(teacher_total)
            inner, exponent = softmax.open(chosen)
            power, total = softmax.powers(exponent)
            log_total = total.double().log()
            at_target = exponent.gather(1, targets[block]).double()
            # Differences first: where the two agree the sum is exactly 0, not rounding noise.
            divergence = teacher_exponent.sub_(exponent).mul_(prob).sum(-1, keepdim=True).double()
            divergence = divergence * math.log(2.0) + (log_total - teacher_total.double().log())
            cross = exponent.mul_(prob).sum(-1, keepdim=True).double()
            terms[block, :1] = log_total - cross * math.log(2.0)
            terms[block, 1:2] = divergence.clamp(min=0)  # rounding may leave -1e-7 of a zero
            terms[block, 2:] = log_total - at_target * math.log(2.0)
            if not bool(terms[block, :2].isfinite().all()):
                self.counted.refuse_silent_teacher(teacher_total, span.start + block.start)
                terms[block, :2] = self._with_excluded(chosen, teacher_raw[block])
            if gradient:
                power.div_(total).sub_(prob).mul_(softmax.slope)
                softmax.close(power, inner, chosen)
        return terms

    def _with_excluded(self, raw: Tensor, teacher_raw: Tensor) -> Tensor:
        """n 2: cross-entropy and KL of a block with logits of -inf, which are no part of either."""
        _, exponent = self.teacher.softmax.open(teacher_raw)
        log_p = (exponent * math.log(2.0)).log_softmax(-1)
        _, exponent = self.softmax.open(raw)
        log_q = (exponent * math.log(2.0)).log_softmax(-1)
        cross = (log_p.exp() * log_q).masked_fill(log_p == -math.inf, 0.0)
        kl, _ = KL().pointwise(log_p, log_q)
        return torch.stack([-cross.sum(-1), kl.sum(-1)], -1).double()
