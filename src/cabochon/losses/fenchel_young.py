"""Fenchel-Young losses: what is minimised when a model predicts with an f-softargmax.

    l(t, y; q) = softmax_f(t; q) + D_f(y, q) - <t, y>

It is convex in the logits t, at least 0, and 0 only where softargmax_f(t; q) = y; its gradient is
softargmax_f(t; q) - y. KL with q = 1 gives the cross-entropy (less the entropy of y, if y is a
distribution). A sparse f has a margin: loss and gradient are exactly 0 once the target's logit is
far enough above all others (1 for chi-square, 1 / (a - 1) for alpha, at q = 1).

Where D_f(y, q) is infinite (f(0) is, as for reverse KL, Jeffreys and alpha <= 0, and y gives some
class nothing, as one token does), that constant is left out. Such a loss is measured from that of
equal logits, so it may be negative; its gradient is the same.

Source: Roulet et al. 2025, arXiv:2501.18537; Blondel, Martins and Niculae 2020, arXiv:1901.02324.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cabochon.core import Loss, Prediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import f_divergences
from cabochon.losses.f_divergences import FDivergence
from cabochon.losses.f_softargmax import Measure, Task, maximum, measured, solve
from cabochon.losses.linear import cross_entropy
from cabochon.losses.rows import Counted, RowSoftmax, blocks, row_sums, wide

__all__ = ["LossName", "linear", "loss", "named"]

LossName = Literal[
    "cross_entropy",
    "reverse_kl",
    "jsd",
    "jsd_paper",
    "hellinger",
    "chi_square",
    "alpha",
    "jeffreys",
]
"""Losses of the next token that a config can ask for; all but the first are those of their f."""

_SUM_ERROR = 1e-3
"""How far the sum of a target distribution may lie from 1."""


def loss(
    f: FDivergence,
    logits: Tensor,
    target: Tensor,
    *,
    measure: Measure = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of each row; its gradient by the logits is f_softargmax - y, at any temperature.

    With a temperature the divergence is temperature x D_f. Differentiable twice by the logits;
    measure and target are constants.

    Args:
        f: the divergence.
        logits: ... V. Classes at -inf are left out.
        target: ... int64, one class each; or ... V, a distribution y each.
        measure: q, as in `f_softargmax`.
        temperature: above 0.

    Returns:
        ... float32 (float64 for float64 logits).

    Raises:
        DataError: as `f_softargmax`; a target that is not in the vocabulary, that is left out, or
            is not a distribution.
        ConfigError: as `f_softargmax`.
    """
    _, level, highest = maximum(f, logits, measure, temperature, value=True)
    q = measured(measure, logits)
    if target.dtype.is_floating_point:
        y = _checked_distribution(target, logits, q)
        constant, finite = _distribution_constant(f, logits, y, q)
        lower = (wide(logits) - highest[..., None]).masked_fill(y == 0.0, 0.0)
        said = (lower * y).sum(-1)
    else:
        _check_classes(target, logits)
        chosen = target[..., None]
        constant = _class_constant(f, logits, chosen, q)
        finite = torch.tensor(math.isfinite(f.at_zero), device=logits.device)
        said = wide(logits.gather(-1, chosen)).squeeze(-1) - highest
        _refuse_left_out(said, target, q)
    value = temperature * (level + constant) - said
    # Rounding may leave -1e-7 of a zero; the gradient is not touched.
    return value + torch.where(finite, (-value.detach()).clamp(min=0.0), 0.0)


def linear(
    prediction: Prediction,
    batch: TokenBatch,
    f: FDivergence,
    *,
    measure: Measure = 1.0,
    chunk: int | None = None,
) -> Loss:
    """The summed loss of the next tokens, with logits that exist one chunk at a time.

    Soft-cap and temperature of the prediction are inside its logits. KL at measure 1 gives the
    numbers of `losses.cross_entropy`.

    Args:
        prediction: of the positions of `batch`, as in `losses.cross_entropy`.
        batch: gives targets and mask, B T.
        f: the divergence.
        measure: q, a number or a tensor of V. With the classes' frequencies logits say how much
            likelier than usual a token is.
        chunk: rows whose logits exist at once; it changes nothing but speed and memory.

    Returns:
        The sum over the positions whose mask is True, their number, and two further sums:
        ``accuracy``, of how many the target's logit is a highest one, and for a sparse f
        ``support``, how many tokens have a probability above 0.

    Raises:
        DataError: a counted target is not in the vocabulary, or has measure 0.
        ConfigError: `chunk` is not positive; a measure as in `f_softargmax`.
    """
    counted = Counted.of(batch)
    score = _LossScore(prediction, counted, f, measure)
    sums = row_sums(prediction, counted.rows, score, chunk)
    report = {"accuracy": sums[1].detach()}
    if f.sparse:
        report["support"] = sums[2].detach()
    return Loss(total=sums[0], weight=counted.weight, report=report)


def named(
    name: LossName, parameter: float | None = None
) -> Callable[[Prediction, TokenBatch], Loss]:
    """The loss of the next token that a config means: cross-entropy, or `linear` with a unit q.

    Args:
        name: cross_entropy, or what `f_divergences.named` knows.
        parameter: a of alpha, beta of jsd and jsd_paper; of the others none.

    Raises:
        ConfigError: as `f_divergences.named`.
    """
    if name == "cross_entropy":
        if parameter is not None:
            raise ConfigError(
                f"loss cross_entropy takes no loss_parameter, got {parameter:g}; leave it out"
            )
        return cross_entropy
    try:
        f = f_divergences.named(name, parameter)
    except ConfigError as error:
        raise ConfigError(f"loss and loss_parameter: {error}") from None
    return lambda prediction, batch: linear(prediction, batch, f)


class _LossScore:
    """The loss of a token, whether its logit is highest, and the size of the support."""

    size = 3

    def __init__(
        self, prediction: Prediction, counted: Counted, f: FDivergence, measure: Measure
    ) -> None:
        self.softmax = RowSoftmax.of(prediction)
        self.counted = counted
        self.f = f
        self.measure = measure

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        targets = self.counted.targets_within(raw.shape[-1], span)
        terms = raw.new_zeros(raw.shape[0], self.size, dtype=torch.float64)
        softmax, f = self.softmax, self.f
        for block in blocks(raw):
            chosen, wanted = raw[block], targets[block]
            inner, exponent = softmax.open(chosen)
            logits = exponent.mul_(math.log(2.0))
            q = measured(self.measure, logits)
            if isinstance(q, Tensor):
                logits.masked_fill_(q == 0.0, -math.inf)
            lost = ~logits.amax(-1, keepdim=True).isfinite()
            if bool(lost.any()):  # the loss is NaN there, as any other's; `fit` says which step
                logits.masked_fill_(lost, 0.0)
            found = solve(Task(f, logits, q, 1.0, True))
            said = logits.gather(-1, wanted) - found.highest
            _refuse_left_out(said.squeeze(-1), wanted.squeeze(-1), q)
            constant = _class_constant(f, logits, wanted, q)
            value = (found.level.double() + constant - said.squeeze(-1))[:, None]
            if math.isfinite(f.at_zero):
                value.clamp_(min=0.0)  # rounding may leave -1e-7 of a zero
            terms[block, :1] = value.masked_fill(lost, math.nan)
            terms[block, 1:2] = (said == 0.0).double()
            if f.sparse:
                terms[block, 2] = (found.prob > 0.0).sum(-1).double()
            if gradient:
                by_logit = found.prob.mul_(softmax.slope).masked_fill_(lost, math.nan)
                by_logit.scatter_add_(1, wanted, by_logit.new_full(wanted.shape, -softmax.slope))
                softmax.close(by_logit, inner, chosen)
        return terms


def _class_constant(f: FDivergence, logits: Tensor, chosen: Tensor, measure: Measure) -> Tensor:
    """What is added to softmax_f's level and -t for one class (... 1): D_f(y, q) + f(0) sum q.

    Where f(0) is infinite, less the level of equal logits instead.
    """
    if not math.isfinite(f.at_zero):
        return -_equal_level(f, logits, measure)
    if isinstance(measure, Tensor):
        q = measure.expand_as(logits).gather(-1, chosen).squeeze(-1)
    else:
        q = torch.full((), measure, dtype=torch.float64, device=logits.device)
    return f.slope(1.0 / q) - q * f.surplus(1.0 / q)


def _distribution_constant(
    f: FDivergence, logits: Tensor, y: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    """(the same for distributions y, whether it is D_f(y, q) + f(0) sum q)."""
    spoken = y > 0.0
    ratio = torch.where(spoken, y / measure, 1.0)
    part = y * f.slope(ratio) - f.surplus(ratio) * measure
    constant = part.masked_fill(~spoken, 0.0).sum(-1)
    finite = torch.ones_like(constant, dtype=torch.bool)
    if not math.isfinite(f.at_zero):
        live = (logits > -math.inf) & torch.as_tensor(measure != 0.0, device=logits.device)
        finite = (spoken | ~live).all(-1)
        constant = torch.where(finite, constant, -_equal_level(f, logits, measure))
    return constant, finite


def _equal_level(f: FDivergence, logits: Tensor, measure: Measure) -> Tensor:
    """softmax_f's level where all logits are equal, so that every ratio is 1 / sum q."""
    live = (logits.detach() > -math.inf).double()
    whole = (live * measure).sum(-1)
    return whole * f.surplus(1.0 / whole) - f.slope(1.0 / whole)


def _check_classes(target: Tensor, logits: Tensor) -> None:
    if target.shape != logits.shape[:-1]:
        raise DataError(
            f"classes of shape {tuple(target.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}; give one for each row"
        )
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= logits.shape[-1]):
        raise DataError(
            f"classes lie in [{int(target.min())}, {int(target.max())}], the logits have "
            f"{logits.shape[-1]}"
        )


def _checked_distribution(target: Tensor, logits: Tensor, measure: Measure) -> Tensor:
    if target.shape != logits.shape:
        raise DataError(
            f"distributions of shape {tuple(target.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}"
        )
    y = wide(target.detach())
    wrong = (y.sum(-1) - 1.0).abs()
    if not bool((y >= 0.0).all()) or not bool((wrong <= _SUM_ERROR).all()):
        raise DataError("a target distribution has a negative entry, or does not sum to 1")
    live = (logits.detach() > -math.inf) & torch.as_tensor(measure != 0.0, device=logits.device)
    if bool((y.masked_fill(live, 0.0) > 0.0).any()):
        raise DataError("a target distribution gives something to a class that is left out")
    return y


def _refuse_left_out(said: Tensor, target: Tensor, measure: Measure) -> None:
    """A class that cannot be said cannot be learned."""
    out = said.detach() == -math.inf
    if isinstance(measure, Tensor):
        q = measure.expand(*target.shape, -1) if measure.dim() == 1 else measure
        out = out | (q.gather(-1, target[..., None]).squeeze(-1) == 0.0)
    if bool(out.any()):
        first = int(out.flatten().int().argmax())
        raise DataError(
            f"target {int(target.flatten()[first])} of row {first} is left out: its logit is -inf "
            "or its measure 0"
        )
