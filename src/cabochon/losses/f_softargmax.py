"""The f-softargmax: softmax with the Kullback-Leibler divergence replaced by any D_f.

    softmax_f(t; q)    = max over distributions p of  <p, t> - D_f(p, q)
    softargmax_f(t; q) = the p of that maximum, which is the gradient of softmax_f

KL gives softmax, chi-square sparsemax, alpha alpha-entmax. With v_j = t_j - tau the solution is
p_j = q_j (f*)'(v_j), with the one tau that makes it sum to 1.

tau is not what is searched for here. Where f' is bounded, v_j comes so near its end that t_j - tau
has no correct digit left in float32 at large vocabularies. The unknown is u = p_i / q_i at the
largest logit t_i instead, and p_j / q_j is the ratio whose slope f' is t_i - t_j lower
(`FDivergence.lowered`), in a form without cancellation. The total grows with u, which lies between
1 / sum q and 1 / q_i; Newton's steps on log total over log u, kept inside a bracket that bisection
shrinks where they do not, end after a few passes over all rows at once. Where f is sparse only
logits within f'(1 / q_i) - f'(0) of the largest can have any probability, and only those are kept.

Source: Roulet et al. 2025, arXiv:2501.18537 (operator, bisection); Blondel, Martins and Niculae
2020, arXiv:1901.02324 (Fenchel-Young losses).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError
from cabochon.losses.f_divergences import (
    Alpha,
    ChiSquare,
    FDivergence,
    ReverseKL,
    SquaredHellinger,
    is_kl,
)
from cabochon.losses.rows import wide_dtype

__all__ = [
    "Found",
    "Measure",
    "Task",
    "f_softargmax",
    "f_softmax",
    "maximum",
    "measured",
    "ratios",
    "solve",
]

Measure = float | Tensor
"""The reference measure q: one number for every class, or a tensor of V or of the logits' shape. It
need not sum to 1; classes where it is 0 are left out."""

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits that are worked on at once; on a CPU a few such blocks fit in its cache."""
_MOST_PASSES = 100
"""Bisection alone would need about 60."""
_USUAL_PASSES = 8
"""What a rehearsal without values takes."""
_WORTHWHILE = 4
"""A sparse row is cut to its candidates where they are fewer than one in this many."""
_HALVINGS = 5
"""How often the reach of a sparse row's candidates is halved in search of few."""


def f_softargmax(
    f: FDivergence, logits: Tensor, *, measure: Measure = 1.0, temperature: float = 1.0
) -> Tensor:
    """The distribution p that maximises <p, logits> - temperature D_f(p, measure), row by row.

    Differentiable twice by the logits; the measure is a constant.

    Args:
        f: the divergence.
        logits: ... V, of any floating type. A class at -inf is left out: its probability is 0.
        measure: q; 1 for every class by default, which gives softmax, sparsemax and entmax. With
            1 / V the logits have to be larger to say as much.
        temperature: above 0; p is that of logits / temperature.

    Returns:
        ... V float32 (float64 for float64 logits), each row summing to 1.

    Raises:
        DataError: a row holds NaN or +inf, or nothing but -inf.
        ConfigError: a measure that is negative, not finite or of another shape; a temperature that
            is not a positive number.
    """
    prob, _, _ = maximum(f, logits, measure, temperature, value=False)
    return prob


def f_softmax(
    f: FDivergence, logits: Tensor, *, measure: Measure = 1.0, temperature: float = 1.0
) -> Tensor:
    """The maximum of <p, logits> - temperature D_f(p, measure) over distributions p, row by row.

    Args and errors are those of `f_softargmax`, which is its gradient.

    Returns:
        ... float32 (float64 for float64 logits). Classes left out count nothing, also in D_f.
    """
    _, value, highest = maximum(f, logits, measure, temperature, value=True)
    q = measured(measure, logits)
    if math.isfinite(f.at_zero):
        q = q if isinstance(q, Tensor) else torch.full_like(value, q)[..., None]
        live = (logits > -math.inf) * q
        value = value - f.at_zero * live.sum(-1)
    return temperature * value + highest


def maximum(
    f: FDivergence, logits: Tensor, measure: Measure, temperature: float, *, value: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, softmax_f above the highest logit, the highest logit) of each row.

    The second is of logits / temperature, sum_j q_j surplus(p_j / q_j) - f'(u), without the part
    -f(0) sum q, which would drown it in large vocabularies; its gradient is that of softmax_f. It
    is empty unless `value`. Arguments and errors are those of `f_softargmax`.
    """
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"temperature must be a positive number, got {temperature}")
    q = measured(measure, logits)
    if isinstance(q, Tensor) and bool((q == 0.0).any()):
        logits = logits.masked_fill(q == 0.0, -math.inf)
    found: tuple[Tensor, Tensor, Tensor] = _Maximum.apply(logits, f, q, temperature, value)
    return found


def measured(measure: Measure, logits: Tensor) -> Measure:
    """The measure of these logits: a positive number, or V or n V in their type.

    Raises:
        ConfigError: it is negative, not finite, of another shape, or 0 for a whole row.
    """
    if not isinstance(measure, Tensor):
        if not 0.0 < measure < math.inf:
            raise ConfigError(f"a measure must be positive and finite, got {measure}")
        return measure
    q = measure.detach().to(logits.device, wide_dtype(logits.dtype))
    if q.shape not in (logits.shape, logits.shape[-1:]):
        raise ConfigError(
            f"a measure of shape {tuple(measure.shape)} does not fit logits of shape "
            f"{tuple(logits.shape)}; give one number, one for each class, or one for each logit"
        )
    if not bool(((q >= 0.0) & (q < math.inf)).all()) or not bool((q > 0.0).any(-1).all()):
        raise ConfigError("a measure must be finite, nowhere negative, and not 0 for all classes")
    return q


def _check_rows(highest: Tensor, first: int) -> None:
    bad = ~highest.isfinite().flatten()
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        found = float(highest[at])
        what = "nothing but -inf" if found == -math.inf else f"a logit of {found}"
        raise DataError(
            f"row {first + at} of the logits has {what}, so no distribution belongs to it; "
            "mask classes with -inf, and leave at least one"
        )


class _Maximum(torch.autograd.Function):
    """(p, level, highest) of logits; the derivatives of the first two need only p."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        f: FDivergence,
        measure: Measure,
        temperature: float,
        value: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        found = solve(Task(f, rows, _by_row(measure, rows), temperature, value))
        prob, highest = found.prob.view(logits.shape), found.highest.view(logits.shape[:-1])
        ctx.save_for_backward(prob)
        ctx.mark_non_differentiable(highest)
        ctx.set_materialize_grads(False)
        ctx.f, ctx.measure, ctx.temperature = f, measure, temperature
        ctx.dtype = logits.dtype
        return prob, found.level.view(highest.shape if value else (0,)), highest

    @staticmethod
    def backward(ctx: Any, by_prob: Tensor | None, by_level: Tensor | None, _: None) -> Any:
        (prob,) = ctx.saved_tensors
        total: Tensor | None = None
        if by_prob is not None:
            total = _Jacobian.apply(prob, by_prob, ctx.f, ctx.measure)
        if by_level is not None:
            part = by_level[..., None] * prob
            total = part if total is None else total + part
        if total is not None:
            total = (total / ctx.temperature).to(ctx.dtype)
        return total, None, None, None, None


class _Jacobian(torch.autograd.Function):
    """J g with J = diag(w) - w w^T / sum w, w_j = q_j / f''(p_j / q_j) where p_j > 0."""

    @staticmethod
    def forward(ctx: Any, prob: Tensor, vector: Tensor, f: FDivergence, measure: Measure) -> Tensor:
        ctx.save_for_backward(prob, vector)
        ctx.f, ctx.measure = f, measure
        return _jacobian_product(f, prob, measure, vector)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        prob, vector = ctx.saved_tensors
        f, measure = ctx.f, ctx.measure
        weight = _responses(f, prob, measure)
        share = weight / weight.sum(-1, keepdim=True)
        above_grad = grad - (share * grad).sum(-1, keepdim=True)
        above = vector - (share * vector).sum(-1, keepdim=True)
        live = prob > 0.0
        ratio = torch.where(live, prob / measure, 1.0)
        by_prob = (f.response_slope(ratio) * above * above_grad).masked_fill(~live, 0.0)
        return by_prob, weight * above_grad, None, None


def _responses(f: FDivergence, prob: Tensor, measure: Measure) -> Tensor:
    """w of `_Jacobian`."""
    live = prob > 0.0
    ratio = prob if _is_unit(measure) else torch.where(live, prob / measure, 1.0)
    return (f.response(ratio) * measure).masked_fill_(~live, 0.0)


def _jacobian_product(f: FDivergence, prob: Tensor, measure: Measure, vector: Tensor) -> Tensor:
    shape = prob.shape
    prob, vector = prob.reshape(-1, shape[-1]), vector.reshape(-1, shape[-1])
    measure = _by_row(measure, prob)
    out = torch.empty_like(prob)
    for block in _blocks(prob):
        weight = _responses(f, prob[block], _of_block(measure, block))
        product = torch.mul(weight, vector[block], out=out[block])
        mean = product.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        product.addcmul_(weight, mean, value=-1.0)
    return out.view(shape)


@dataclass(frozen=True)
class Task:
    """What to solve."""

    f: FDivergence
    rows: Tensor
    """n V: logits."""
    measure: Measure
    """q: a number, V or n V. Where it is 0 the logits are -inf."""
    temperature: float
    value: bool
    """Whether `Found.level` is wanted."""


@dataclass(frozen=True)
class Found:
    """The solution of a `Task`."""

    prob: Tensor
    """n V: p."""
    level: Tensor
    """n: softmax_f as `maximum` gives it; empty where it was not wanted."""
    highest: Tensor
    """n 1: the highest logits."""


def solve(task: Task) -> Found:
    """The f-softargmax of each row, without a gradient.

    Raises:
        DataError: a row has no finite highest logit.
    """
    rows = task.rows
    order = _kernel_order(task) if rows.is_cuda else None
    if order is not None:
        return _solve_by_kernel(task, *order)
    prob = rows.new_empty(rows.shape, dtype=wide_dtype(rows.dtype))
    found = Found(
        prob, prob.new_empty(len(rows) if task.value else 0), prob.new_empty(len(rows), 1)
    )
    kept: list[Tensor] = []
    for block in _blocks(rows):
        highest = found.highest[block].copy_(rows[block].amax(-1, keepdim=True))
        _check_rows(highest, block.start)
        if is_kl(task.f):
            _solve_softmax(task, block, found)
            continue
        near = _candidates(task, block, highest) if task.f.sparse else None
        if near is None:
            gap = (highest - rows[block]).div_(task.temperature)
            _solve_block(task, block, gap, found)
        else:
            prob[block] = 0.0
            kept.append(near)
    if kept:
        _solve_candidates(task, torch.cat(kept), found)
    return found


def _kernel_order(task: Task) -> tuple[float, float] | None:
    """(a, what multiplies gaps) where f is, but for a factor, an alpha divergence of the kernel."""
    f = task.f
    if is_kl(f):
        order = 1.0, 1.0
    elif isinstance(f, SquaredHellinger):
        order = 0.5, 2.0
    elif isinstance(f, ReverseKL | ChiSquare):
        order = (2.0 if f.sparse else 0.0), 1.0
    elif isinstance(f, Alpha):
        order = f.a, 1.0
    else:
        return None
    exact = order[0] == 1.0 or -1.0 <= order[0] <= 0.8 or 1.2 <= order[0] <= 2.0
    plain = not isinstance(task.measure, Tensor) and task.rows.dtype != torch.float64
    return order if exact and plain and find_spec("triton") is not None else None


def _solve_by_kernel(task: Task, a: float, factor: float) -> Found:
    from cabochon.losses.f_softargmax_kernel import alpha_softargmax

    q = task.measure
    assert isinstance(q, float | int)
    rows = task.rows.contiguous()
    highest = rows.amax(-1, keepdim=True).float()
    _check_rows(highest, 0)
    prob = alpha_softargmax(rows, a, q, factor / task.temperature)
    level = prob.new_empty(0)
    if task.value:
        ratio = prob / q
        level = _level(task.f, ratio, ratio.amax(-1, keepdim=True), q)
    return Found(prob, level, highest)


def _solve_block(task: Task, block: slice, gap: Tensor, found: Found) -> None:
    q = _of_block(task.measure, block)
    ratio, top = ratios(task.f, gap, q)
    if task.value:
        found.level[block] = _level(task.f, ratio, top, q)
    torch.mul(ratio, q, out=found.prob[block])


def _solve_softmax(task: Task, block: slice, found: Found) -> None:
    """KL: p is proportional to q exp(t)."""
    q = _of_block(task.measure, block)
    power = (task.rows[block] - found.highest[block]).div_(task.temperature)
    if isinstance(q, Tensor):
        power += q.log()
    prob = torch.exp(power, out=found.prob[block])
    # torch.softmax adds up 262,144 terms with an error of 2e-5; a sum of its own errs by 1e-7.
    total = prob.sum(-1, keepdim=True)
    prob.div_(total)
    if task.value:
        scale = 1.0 if isinstance(q, Tensor) else q
        found.level[block] = 1.0 + total.squeeze(-1).log() + math.log(scale)


def _level(f: FDivergence, found: Tensor, top: Tensor, measure: Measure) -> Tensor:
    """Sum of q surplus(u) less f'(u at the top)."""
    part = f.surplus(found)
    if not math.isfinite(f.at_zero):
        part = part.masked_fill(found == 0.0, 0.0)  # classes left out
    return (part * measure).sum(-1) - f.slope(top).squeeze(-1)


def _candidates(task: Task, block: slice, highest: Tensor) -> Tensor | None:
    """(row, column) of the logits of a block that can have a probability; None if too many.

    The ratio at the highest logit is at most 1 / q there, and slopes below f'(0) give nothing, so
    logits further than f'(1 / q) - f'(0) below the highest are out. Where that leaves many, half
    of it may do: what is within suffices if it holds a total of at least 1 at the ratio that
    gives nothing beyond.
    """
    f, rows, q = task.f, task.rows[block], task.measure
    if rows.is_meta:  # a rehearsal of sizes: there are no values to tell few from many
        return None
    if isinstance(q, Tensor):
        at = rows.argmax(-1, keepdim=True)
        ratio = 1.0 / (q[at] if q.dim() == 1 else q[block].gather(1, at))
    else:
        ratio = highest.new_tensor(1.0 / q)
    reach = f.slope(ratio) - f.slope_at_zero
    for attempt in range(_HALVINGS):
        width = reach * task.temperature
        floor = highest - width
        floor -= 4.0 * torch.finfo(floor.dtype).eps * (highest.abs() + width)
        within = rows >= floor
        if int(within.count_nonzero()) * _WORTHWHILE <= rows.numel():
            near = within.nonzero()
            near[:, 0] += block.start
            if attempt == 0:
                return near
            gap, weight, _ = _padded(task, near, highest, block.start)
            top = f.conjugate_slope(reach + f.slope_at_zero)
            total = (f.lowered(top, f.warped(gap)) * weight).sum(-1)
            return near if bool((total >= 1.0).all()) else None
        reach = 0.5 * reach
    return None


def _padded(
    task: Task, near: Tensor, highest: Tensor, first: int
) -> tuple[Tensor, Measure, tuple[Tensor, Tensor]]:
    """(gaps of the rows in `near`, m c, filled up with inf; q; where each entry of `near` is).

    `highest` begins with that of row `first`.
    """
    row, column = near.unbind(1)
    _, place, count = row.unique_consecutive(return_inverse=True, return_counts=True)
    offset = count.cumsum(0) - count
    slot = torch.arange(len(row), device=row.device) - offset[place]
    gap = highest.new_full((len(count), int(count.max())), math.inf)
    gap[place, slot] = (highest[row - first, 0] - task.rows[row, column]) / task.temperature
    q = task.measure
    if isinstance(q, Tensor):
        held = q[column] if q.dim() == 1 else q[row, column]
        q = torch.ones_like(gap)
        q[place, slot] = held
    return gap, q, (place, slot)


def _solve_candidates(task: Task, near: Tensor, found: Found) -> None:
    """Solve the rows that `near` (row, column; in order) names, from those entries alone."""
    gap, q, place = _padded(task, near, found.highest, 0)
    ratio, top = ratios(task.f, gap, q)
    row, column = near.unbind(1)
    found.prob[row, column] = (ratio * q)[place]
    if task.value:
        found.level[row.unique_consecutive()] = _level(task.f, ratio, top, q)


def ratios(f: FDivergence, gap: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """(u = p / q, n V; u at gap 0, n 1) of the f-softargmax of rows of gaps.

    Args:
        f: the divergence.
        gap: n V >= 0, how far each logit lies below the highest of its row; inf leaves it out.
        measure: a positive number, V or n V.
    """
    lowest, highest, start = _bracket(f, gap, measure)
    warped, unit = f.warped(gap), _is_unit(measure)
    tolerance = 8.0 * torch.finfo(gap.dtype).eps
    top, last = start, (highest / lowest).log()
    for passes in range(_USUAL_PASSES if gap.is_meta else _MOST_PASSES):
        found = f.lowered(top, warped)
        total = (found if unit else found * measure).sum(-1, keepdim=True)
        wrong = (total - 1.0).abs()
        done = (wrong <= tolerance) | (last.abs() <= tolerance)
        if bool(done.all()):
            break
        lowest = torch.where(total < 1.0, top, lowest)
        highest = torch.where(total > 1.0, top, highest)
        # d log total / d log u, from d u_j / d u = f''(u) / f''(u_j)
        weight = f.response(found) if unit else f.response(found) * measure
        if f.sparse:
            weight = weight.masked_fill_(found == 0.0, 0.0)
        rate = weight.sum(-1, keepdim=True) * top / (f.response(top) * total)
        step = -total.log() / rate
        next_top = top * step.exp()
        if not passes:  # far below 1 at the lower end: the root is nearer to the upper one
            next_top = torch.where(total < 0.25, highest, next_top)
            last = torch.where(total < 0.25, math.inf, last)
        good = (next_top >= lowest) & (next_top <= highest) & (step.abs() <= 0.5 * last.abs())
        halved = lowest.sqrt() * highest.sqrt()
        next_top = torch.where(good, next_top, halved)
        last = torch.where(good, step, (halved / top).log())
        top = torch.where(done, top, next_top)
    return found.div_(total), top


def _bracket(f: FDivergence, gap: Tensor, measure: Measure) -> tuple[Tensor, Tensor, Tensor]:
    """(below, above, where to begin) for u at gap 0, n 1 each."""
    like = gap[:, :1]
    if isinstance(measure, Tensor):
        at = gap.argmin(-1, keepdim=True)
        whole = measure.expand_as(gap)
        lowest, highest = 1.0 / whole.sum(-1, keepdim=True), 1.0 / whole.gather(1, at)
    else:
        lowest = torch.full_like(like, 1.0 / (measure * gap.shape[1]))
        highest = torch.full_like(like, 1.0 / measure)
    # A measure that sums to about 1 lets the largest ratio be large; a unit one hardly, unless
    # the result is sparse.
    start = torch.where(lowest > 0.5, highest, lowest) if not f.sparse else highest
    return lowest, highest, start


def _is_unit(measure: Measure) -> bool:
    return not isinstance(measure, Tensor) and measure == 1.0


def _by_row(measure: Measure, rows: Tensor) -> Measure:
    if isinstance(measure, Tensor) and measure.dim() > 1:
        return measure.reshape(rows.shape)
    return measure


def _of_block(measure: Measure, block: slice) -> Measure:
    if isinstance(measure, Tensor) and measure.dim() > 1:
        return measure[block]
    return measure


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS["cuda" if rows.is_cuda else "cpu"] // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))
