"""D_f(p, q) between a teacher's whole distribution p and the student's q, row by row.

With a and t the base-2 exponents of student and teacher (`RowSoftmax`), d = log2(p / q) and
g = q (f(u) - u f'(u)) at u = p / q, the gradient by the student's logits is g - q sum(g). Three
families have a path of few passes over blocks that stay in the processor's cache:

    KL(p || q)        g = -p                                   gradient q - p
    KL(q || p)        g = -q d                                 gradient q (mean d - d)
    Jensen-Shannon    g = -(1 - beta) q M, M = log2(m / q)     gradient (1 - beta) q (mean M - M)

with means under q, and m / q = beta 2^d + (1 - beta), which needs no mixture and is exactly 1 where
the two agree. Every other f, and every block of rows with logits of -inf, goes through
`FDivergence.pointwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import LinearPrediction, Prediction
from cabochon.core.errors import TokenizerMismatch
from cabochon.losses.f_divergences import KL, Alpha, FDivergence, JensenShannon, ReverseKL
from cabochon.losses.products import product_dtype, unembed
from cabochon.losses.rows import Counted, RowSoftmax, blocks, wide

__all__ = ["DivergenceScore", "TeacherRows", "check_vocabularies", "is_forward_kl"]

_LN2 = math.log(2.0)
_TEACHER_ELEMENTS = 2**25
"""A teacher's logits that exist at once, where a chunk of the student's has more."""
_FAR = 100.0
"""Octaves between p and q beyond which Jensen-Shannon's terms no longer change in float32."""
_TEMPERED_BETA = 0.02
"""Nearer to 0 or 1 than this, beta's rescaled divergence is left to `pointwise`, which divides by
beta before anything is rounded."""


@dataclass(frozen=True)
class _Side:
    """One distribution over the vocabulary, 2 ** exponent / total, in buffers to be written on."""

    exponent: Tensor
    """n V."""
    power: Tensor
    """n V: 2 ** exponent."""
    total: Tensor
    """n 1."""

    def log_prob(self) -> Tensor:
        """n V: in nats."""
        return (self.exponent - self.total.log2()) * _LN2


_Outcome = tuple[Tensor, Tensor, Tensor]
"""(value n 1 in nats, gradient by the student's logits n V over a factor, that factor n 1)."""
_Block = Callable[[_Side, _Side, Tensor], _Outcome]
"""Of teacher and student, and log2 of the student's total over the teacher's, n 1."""


class TeacherRows:
    """A teacher's logits of the rows of a chunk, in a buffer used again and again."""

    def __init__(self, teacher: Prediction) -> None:
        self.teacher = teacher
        self.softmax = RowSoftmax.of(teacher)

    def raw(self, rows: Tensor, like: Tensor) -> Tensor:
        """n V: unembedded hidden states, or logits, of the flat positions `rows`.

        Raises:
            TokenizerMismatch: there are more or fewer of them than in `like`, the student's (n V).
        """
        teacher = self.teacher
        if isinstance(teacher, LinearPrediction):
            check_vocabularies(like.shape[-1], teacher.head.shape[0])
            head = teacher.head
            quick = product_dtype(head)
            hidden = teacher.hidden.detach().flatten(0, 1)[rows].to(head.dtype).to(quick)
            return unembed(hidden, head.detach(), self.softmax.block("raw", like, quick))
        with torch.no_grad():
            logits = wide(teacher.logits(rows))
        check_vocabularies(like.shape[-1], logits.shape[-1])
        return logits


class DivergenceScore:
    """D_f(p, q), with -log q(target) beside it."""

    size = 2

    def __init__(
        self, student: Prediction, teacher: Prediction, counted: Counted, f: FDivergence
    ) -> None:
        self.softmax = RowSoftmax.of(student)
        self.teacher = TeacherRows(teacher)
        self.counted = counted
        self.f = f
        self.quick = _quick(f)

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_empty(raw.shape[0], self.size, dtype=torch.float64)
        step = max(1, _TEACHER_ELEMENTS // raw.shape[1])
        for start in range(0, len(raw), step):
            part = slice(start, start + step)
            rows = self.counted.rows[span][part]
            teacher_raw = self.teacher.raw(rows, raw[part])
            for block in blocks(raw[part]):
                first = span.start + start + block.start
                terms[part][block] = self._block(
                    raw[part][block], teacher_raw[block], targets[part][block], first, gradient
                )
        weights = self.counted.factor(span, terms)
        return terms if weights is None else terms * weights

    def _block(
        self, raw: Tensor, teacher_raw: Tensor, targets: Tensor, first: int, gradient: bool
    ) -> Tensor:
        """n size: the terms of a block, whose first row is the counted position `first`."""
        inner, teacher, student = self._open(raw, teacher_raw)
        log_total = student.total.double().log2()
        surprise = (log_total - student.exponent.gather(1, targets)) * _LN2
        outcome: _Outcome | None = None
        if self.quick is not None:
            shift = log_total - teacher.total.double().log2()
            outcome = self.quick(teacher, student, shift.to(student.total.dtype))
        if outcome is None or not bool(outcome[0].isfinite().all()):
            if outcome is not None:
                inner, teacher, student = self._open(raw, teacher_raw)
            self.counted.refuse_silent_teacher(teacher.total, first)
            outcome = _pointwise(self.f, teacher, student)
        value, by_logit, factor = outcome
        if gradient:
            factor = factor * self.softmax.slope
            weights = self.counted.factor(slice(first, first + len(raw)), factor)
            if weights is not None:
                factor = factor * weights
            self.softmax.close(by_logit, inner, raw, factor)
        return torch.cat([value, surprise], -1)

    def _open(self, raw: Tensor, teacher_raw: Tensor) -> tuple[Tensor, _Side, _Side]:
        """(inner of the student, teacher, student) of a block."""
        dtype = torch.promote_types(raw.dtype, torch.float32)
        _, exponent = self.teacher.softmax.open(teacher_raw)
        exponent = exponent.to(dtype)
        power, total = self.teacher.softmax.powers(exponent)
        teacher = _Side(exponent, power, total)
        inner, exponent = self.softmax.open(raw)
        power, total = self.softmax.powers(exponent)
        return inner, teacher, _Side(exponent, power, total)


def is_forward_kl(f: FDivergence) -> bool:
    """`f` is KL(p || q) under any of its names."""
    return (
        isinstance(f, KL)
        or (isinstance(f, JensenShannon) and f.beta == 0.0)
        or (isinstance(f, Alpha) and f.a == 1.0)
    )


def _is_reverse_kl(f: FDivergence) -> bool:
    return (
        isinstance(f, ReverseKL)
        or (isinstance(f, JensenShannon) and f.beta == 1.0)
        or (isinstance(f, Alpha) and f.a == 0.0)
    )


def check_vocabularies(student: int, teacher: int) -> None:
    """Refuses unlike sizes.

    Raises:
        TokenizerMismatch: they differ.
    """
    if student != teacher:
        raise TokenizerMismatch(
            f"the student predicts {student} tokens, the teacher {teacher}; "
            "distil with a teacher that has the student's tokenizer"
        )


def _quick(f: FDivergence) -> _Block | None:
    """The path of few passes, for those that have one."""
    if is_forward_kl(f):
        return _forward_kl
    if _is_reverse_kl(f):
        return _reverse_kl
    if isinstance(f, JensenShannon) and _TEMPERED_BETA <= f.beta <= 1.0 - _TEMPERED_BETA:
        beta, scale = f.beta, f.scale / (f.beta * (1.0 - f.beta))
        return lambda teacher, student, shift: _jensen_shannon(teacher, student, shift, beta, scale)
    return None


def _forward_kl(teacher: _Side, student: _Side, shift: Tensor) -> _Outcome:
    # Differences first: where the two agree the sum is exactly 0, not rounding noise.
    log_ratio = teacher.exponent.sub_(student.exponent)
    mean = log_ratio.mul_(teacher.power).sum(-1, keepdim=True) / teacher.total
    prob = teacher.power.mul_(student.total / teacher.total)
    by_logit = student.power.sub_(prob)
    return _rounded((mean.double() + shift) * _LN2), by_logit, 1.0 / student.total


def _reverse_kl(teacher: _Side, student: _Side, shift: Tensor) -> _Outcome:
    log_ratio = teacher.exponent.sub_(student.exponent)
    mean, by_logit = _centred(log_ratio, student)
    return _rounded(-(mean.double() + shift) * _LN2), by_logit, -_LN2 / student.total


def _jensen_shannon(
    teacher: _Side, student: _Side, shift: Tensor, beta: float, scale: float
) -> _Outcome:
    """Scale times the paper's form."""
    log_ratio = teacher.exponent.sub_(student.exponent).add_(shift).clamp_(-_FAR, _FAR)
    over_student = torch.exp2(log_ratio, out=student.exponent)
    rest = _complement(beta, over_student)
    torch.add(rest, over_student, alpha=beta, out=over_student).log2_()
    # beta p log(p / m), then (1 - beta) q log(q / m)
    of_teacher = log_ratio.sub_(over_student).mul_(teacher.power).sum(-1, keepdim=True)
    mean, by_logit = _centred(over_student, student)
    value = (of_teacher / teacher.total).double() * beta - mean.double() * (1.0 - beta)
    factor = scale * _LN2
    return _rounded(value * factor), by_logit, -(1.0 - beta) * factor / student.total


def _centred(x: Tensor, student: _Side) -> tuple[Tensor, Tensor]:
    """(mean of x under q, n 1; (x - mean) q times the student's total, over the memory of x)."""
    weighted = x.mul_(student.power)
    mean = weighted.sum(-1, keepdim=True) / student.total
    return mean, weighted.sub_(student.power.mul_(mean))


def _complement(beta: float, like: Tensor) -> Tensor:
    """1 - beta such that, in the type of `like`, it and beta add up to 1 exactly."""
    rounded = torch.tensor(beta, dtype=like.dtype)
    return torch.full((), 1.0 - rounded.item(), dtype=like.dtype, device=like.device)


def _rounded(value: Tensor) -> Tensor:
    """Rounding may leave -1e-7 of a zero. NaN stays NaN."""
    return value.clamp(min=0)


def _pointwise(f: FDivergence, teacher: _Side, student: _Side) -> _Outcome:
    """Of any f and any logits; -inf is a probability of 0."""
    log_q = student.log_prob()
    value, by_log_q = f.pointwise(teacher.log_prob(), log_q)
    by_log_q.masked_fill_(log_q == -math.inf, 0.0)  # a token that is excluded stays excluded
    total = by_log_q.sum(-1, keepdim=True)
    by_logit = by_log_q.sub_(log_q.exp_().mul_(total))
    return value.sum(-1, keepdim=True, dtype=torch.float64), by_logit, torch.ones_like(total)
