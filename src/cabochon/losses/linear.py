"""Losses over large vocabularies that never hold the logits of all rows at once.

Only positions that count are unembedded. `cabochon.losses.rows` says how.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cabochon.core import LinearPrediction, Loss, Prediction, TokenBatch
from cabochon.core.errors import DataError, TokenizerMismatch
from cabochon.losses.rows import RowSoftmax, blocks, dense_sums, linear_sums, wide

__all__ = ["cross_entropy", "distillation"]


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
    rows, targets = _counted(batch)
    if isinstance(prediction, LinearPrediction):
        _check_targets(targets, prediction.head.shape[0])
        score = _TargetScore(prediction, targets)
        sums = linear_sums(prediction, rows, score, chunk)
    else:

        def dense(start: int, stop: int) -> Tensor:
            logits = prediction.logits(rows[start:stop])
            _check_targets(targets[start:stop], logits.shape[-1])
            logprob = wide(logits).log_softmax(-1)
            return -logprob.gather(-1, targets[start:stop, None]).sum()[None]

        sums = dense_sums(dense, rows, 1, chunk)
    return Loss(total=sums[0], weight=_count(rows))


def distillation(
    student: Prediction, teacher: Prediction, batch: TokenBatch, *, chunk: int | None = None
) -> Loss:
    """Summed cross-entropy -sum_x p_T(x) log p_S(x) to the teacher's full distribution, in nats.

    Its gradient is that of KL(p_T || p_S), from which it differs by the teacher's entropy.
    Soft-caps and temperatures of both are inside their distributions. The teacher is a constant:
    it gets no gradient, and may have another width than the student.

    Args:
        student: predictions of the positions of `batch`; as in `cross_entropy`.
        teacher: predictions of the same positions over the same vocabulary.
        batch: gives the mask (and the targets of the report), B T.
        chunk: rows whose logits exist at once, as in `cross_entropy`.

    Returns:
        The sum, the number of positions, and two further sums over them: ``kl``, KL(p_T || p_S),
        which is 0 where student and teacher agree and positive elsewhere, and ``nll``, the
        student's -log p_S(target), comparable with `cross_entropy`.

    Raises:
        TokenizerMismatch: student and teacher have vocabularies of different sizes.
        DataError: a counted target is not in the vocabulary.
        ConfigError: `chunk` is not positive.

    Source: Gemma 2 report, arXiv:2408.00118, section 3.1.
    """
    rows, targets = _counted(batch)
    if isinstance(student, LinearPrediction):
        vocabulary = student.head.shape[0]
        _check_targets(targets, vocabulary)
        if isinstance(teacher, LinearPrediction):
            _check_vocabularies(vocabulary, teacher.head.shape[0])
        score = _TeacherScore(student, teacher, rows, targets)
        sums = linear_sums(student, rows, score, chunk)
    else:

        def dense(start: int, stop: int) -> Tensor:
            chosen = rows[start:stop]
            logits = wide(student.logits(chosen))
            with torch.no_grad():
                wanted = wide(teacher.logits(chosen)).to(logits.dtype)
                _check_vocabularies(logits.shape[-1], wanted.shape[-1])
                _check_targets(targets[start:stop], logits.shape[-1])
                teacher_logprob = wanted.log_softmax(-1)
                teacher_prob = teacher_logprob.exp()
            logprob = logits.log_softmax(-1)
            divergence = (teacher_prob * (teacher_logprob - logprob)).sum(-1).clamp(min=0)
            total = -(teacher_prob * logprob).sum()
            nll = -logprob.gather(-1, targets[start:stop, None]).sum()
            return torch.stack([total, divergence.sum(), nll])

        sums = dense_sums(dense, rows, 3, chunk)
    report = {"kl": sums[1].detach(), "nll": sums[2].detach()}
    return Loss(total=sums[0], weight=_count(rows), report=report)


class _TargetScore:
    """-log p(target)."""

    size = 1

    def __init__(self, prediction: LinearPrediction, targets: Tensor) -> None:
        self.softmax = RowSoftmax(prediction)
        self.targets = targets

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        sums = raw.new_zeros(self.size, dtype=torch.float64)
        softmax = self.softmax
        for block in blocks(raw):
            chosen = raw[block]
            targets = self.targets[span][block, None]
            inner, exponent = softmax.open(chosen)
            at_target = exponent.gather(1, targets)
            power = exponent.exp2_()
            total = power.sum(-1, keepdim=True)
            sums[0] += (total.log() - at_target * math.log(2.0)).sum()
            if gradient:
                power.mul_(softmax.slope / total)
                power.scatter_add_(1, targets, power.new_full(targets.shape, -softmax.slope))
                softmax.close(power, inner, chosen)
        return sums


class _TeacherScore:
    """-sum_x p_T(x) log p_S(x), with KL(p_T || p_S) and -log p_S(target) beside it."""

    size = 3

    def __init__(
        self, student: LinearPrediction, teacher: Prediction, rows: Tensor, targets: Tensor
    ) -> None:
        linear = teacher if isinstance(teacher, LinearPrediction) else None
        self.softmax = RowSoftmax(student)
        self.teacher_softmax = RowSoftmax(linear)
        self.teacher = teacher
        self.vocabulary = student.head.shape[0]
        self.rows = rows
        self.targets = targets

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        sums = raw.new_zeros(self.size, dtype=torch.float64)
        teacher_raw = self._teacher_raw(self.rows[span], raw)
        softmax = self.softmax
        for block in blocks(raw):
            chosen = raw[block]
            _, teacher_exponent = self.teacher_softmax.open(teacher_raw[block])
            prob, teacher_total = self.teacher_softmax.powers(teacher_exponent)
            prob.div_(teacher_total)
            inner, exponent = softmax.open(chosen)
            power, total = softmax.powers(exponent)
            log_total = total.double().log()
            at_target = exponent.gather(1, self.targets[span][block, None]).double()
            # Differences first: where the two agree the sum is exactly 0, not rounding noise.
            divergence = teacher_exponent.sub_(exponent).mul_(prob).sum(-1, keepdim=True).double()
            divergence = divergence * math.log(2.0) + (log_total - teacher_total.double().log())
            cross = exponent.mul_(prob).sum(-1, keepdim=True).double()
            sums[0] += (log_total - cross * math.log(2.0)).sum()
            sums[1] += divergence.clamp(min=0).sum()  # rounding may leave -1e-7 of a zero
            sums[2] += (log_total - at_target * math.log(2.0)).sum()
            if gradient:
                power.div_(total).sub_(prob).mul_(softmax.slope)
                softmax.close(power, inner, chosen)
        return sums

    def _teacher_raw(self, rows: Tensor, like: Tensor) -> Tensor:
        if isinstance(self.teacher, LinearPrediction):
            head = self.teacher.head
            hidden = self.teacher.hidden.flatten(0, 1)[rows].to(head.dtype)
            out = self.teacher_softmax.block("raw", like, head.dtype)
            return torch.mm(hidden, head.T, out=out)
        logits = wide(self.teacher.logits(rows))
        _check_vocabularies(self.vocabulary, logits.shape[-1])
        return logits


def _counted(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Flat indices and targets of the positions that count."""
    rows = batch.mask.flatten().nonzero().squeeze(1)
    return rows, batch.targets.flatten()[rows]


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(len(rows)), device=rows.device)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if len(targets) == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"targets lie in [{low}, {high}], the model predicts {vocabulary} tokens; "
            "use the tokenizer that belongs to the model"
        )


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise TokenizerMismatch(
            f"the student predicts {student} tokens, the teacher {teacher}; "
            "distil with a teacher that has the student's tokenizer"
        )
