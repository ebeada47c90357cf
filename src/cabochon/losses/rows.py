"""Sums over rows of logits that exist one chunk at a time.

`linear_sums` unembeds a chunk of rows into one reused buffer, has a `RowScore` write the gradient
over the logits, and multiplies it out into the gradients of the hidden states and of the head while
the chunk is still at hand, so the backward pass has nothing left to do but scale. `row_sums` does
the same for predictions of any origin, which are asked for their logits chunk by chunk.

The soft-cap is computed through the logistic function, cap tanh(z / cap) = cap (2 s - 1) with
s = 1 / (1 + exp(-2 z / cap)), which vectorises several times better than tanh, and exponentials
are taken in base 2 for the same reason. (The logistic function errs by 2^-24 of the cap where tanh
errs by as much of its value, so a cap that is meant to do nothing goes through tanh.) All of it
happens in float32 (float64 for float64 inputs) on blocks of rows that stay in the processor's
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cabochon.core import LinearPrediction, Prediction, TokenBatch
from cabochon.core.autocast import without_autocast
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses.products import add_outer, embed, product_dtype, unembed

__all__ = [
    "Counted",
    "RowScore",
    "RowSoftmax",
    "blocks",
    "linear_sums",
    "row_sums",
    "row_terms",
    "wide",
    "wide_dtype",
]

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Logits of one chunk when the caller names no chunk: rows x vocabulary."""
_FEW_ROWS = 256
"""With fewer, products are slow and the head's gradient is read and written too often: where a
chunk of as many logits has fewer, it may have four times as many."""
_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
"""Logits that are worked on at once; on a CPU a few such blocks fit in its cache."""
_LARGEST_LOGISTIC_CAP = 100.0
"""Above it a soft-cap through the logistic function would err by more than about 1e-5."""
_TAME_OCTAVES = 100.0
"""Sums of 2 ** exponent over any vocabulary stay inside float32 for exponents of this size."""
_FAR_OCTAVES = 2.0**24
"""A product of this size is rounded by whole octaves, which the exponent of the highest logit would
then be off from 0."""


class RowScore(Protocol):
    """A loss of independent rows of logits."""

    size: int
    """How many terms a row has, the loss first."""

    def __call__(self, raw: Tensor, span: slice, gradient: bool) -> Tensor:
        """Terms (n size, float64) of the rows `span`, whose unembedded hidden states are `raw`.

        With `gradient`, d loss / d raw (n V) is written over `raw`. It may be called again.
        """
        ...


@dataclass(frozen=True)
class Counted:
    """The positions of a batch that count, in order."""

    rows: Tensor
    """n int64: where they stand among the flat positions of (B T)."""
    targets: Tensor
    """n int64: the tokens that follow."""
    weights: Tensor | None
    """n float: what multiplies each one's terms; 1 where absent."""
    shape: tuple[int, int]
    """B, T."""

    @staticmethod
    def of(batch: TokenBatch, weights: Tensor | None = None) -> Counted:
        """Those whose mask is True.

        Raises:
            DataError: `weights` is not B T, or not finite where it counts.
        """
        rows = batch.mask.flatten().nonzero().squeeze(1)
        if weights is not None:
            if weights.shape != batch.mask.shape:
                raise DataError(
                    f"weights have shape {tuple(weights.shape)}; the batch has "
                    f"{tuple(batch.mask.shape)} positions, each of which needs one"
                )
            weights = weights.detach().to(rows.device).flatten()[rows]
        counted = Counted(rows, batch.targets.flatten()[rows], weights, batch.shape)
        if weights is not None:
            counted.refuse(~weights.isfinite(), "weights are not finite")
        return counted

    def refuse_other_positions(self, prediction: object, who: str) -> None:
        """Refuses a linear prediction that is of another batch.

        Raises:
            DataError: it has other positions than B T.
        """
        if isinstance(prediction, LinearPrediction) and prediction.hidden.shape[:2] != self.shape:
            raise DataError(
                f"the {who} predicts {tuple(prediction.hidden.shape[:2])} positions, the batch has "
                f"{self.shape}; both must come from the same batch"
            )

    @property
    def weight(self) -> Tensor:
        """The sum of the weights: how many positions there are, where none is given."""
        if self.weights is None:
            return torch.tensor(float(len(self.rows)), device=self.rows.device)
        return self.weights.sum(dtype=torch.float64).float()

    def targets_within(self, vocabulary: int, span: slice) -> Tensor:
        """n 1: the targets of a span of the positions.

        Raises:
            DataError: one of them is not in the vocabulary.
        """
        targets = self.targets[span]
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise DataError(
                f"targets lie in [{low}, {high}], the model predicts {vocabulary} tokens; "
                "use the tokenizer that belongs to the model"
            )
        return targets[:, None]

    def factor(self, span: slice, like: Tensor) -> Tensor | None:
        """n 1: the weights of a span of the positions, in the type of `like`."""
        return None if self.weights is None else self.weights[span, None].to(like.dtype)

    def refuse(self, wrong: Tensor, what: str, start: int = 0) -> None:
        """Raises a DataError that names the first position where `wrong` (n bool) is True."""
        if bool(wrong.any()):
            first = start + int(wrong.int().argmax())
            row, position = divmod(int(self.rows[first]), self.shape[1])
            others = ", and at others after it" if int(wrong.sum()) > 1 else ""
            raise DataError(f"{what} at position {position} of row {row}{others}")

    def refuse_silent_teacher(self, total: Tensor, start: int) -> None:
        """Refuses a teacher's distribution that is none.

        Args:
            total: n 1, the sum of its unnormalised probabilities.
            start: the counted position of the first of them.

        Raises:
            DataError: one is NaN or infinite.
        """
        what = "the teacher's logits are NaN, or exclude every token,"
        self.refuse(~total.squeeze(1).isfinite(), what, start)


class RowSoftmax:
    """The soft-capped, tempered softmax of blocks of rows, in buffers used again and again."""

    def __init__(self, prediction: LinearPrediction | None) -> None:
        """Of a linear prediction; of logits that need nothing more where it is None."""
        cap = prediction.cap if prediction is not None else None
        temperature = prediction.temperature if prediction is not None else 1.0
        self._gain, scale, self.slope = 1.0, 1.0 / temperature, 1.0 / temperature
        self._bend: Callable[[Tensor], Tensor] | None = None
        self._middle = 0.0
        if cap is not None and cap <= _LARGEST_LOGISTIC_CAP:
            self._bend, self._unbend = torch.sigmoid_, torch.ops.aten.sigmoid_backward.grad_input
            self._gain, scale, self.slope = 2.0 / cap, 2.0 * cap * scale, 4.0 * self.slope
            self._middle = 0.5
        elif cap is not None:
            self._bend, self._unbend = torch.tanh_, torch.ops.aten.tanh_backward.grad_input
            self._gain, scale = 1.0 / cap, cap * scale
        self._octaves = scale / math.log(2.0)
        # Capped logits this small cannot overflow: their highest need not be found first.
        self._tame = cap is not None and cap / temperature / math.log(2.0) < _TAME_OCTAVES
        self._buffers: dict[str, Tensor] = {}

    @staticmethod
    def of(prediction: Prediction) -> RowSoftmax:
        """Of what `row_sums` hands to a score: a linear prediction's products, or any's logits."""
        return RowSoftmax(prediction if isinstance(prediction, LinearPrediction) else None)

    def block(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of the shape of `like`; the same memory each time."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < like.shape[0]:
            held = self._buffers[name] = torch.empty_like(like, dtype=dtype)
        return held[: like.shape[0]]

    def open(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(inner, exponent) of a block: p is proportional to 2 ** exponent.

        `inner` is the value of the soft-cap's function, or `raw` itself without a cap.
        """
        dtype, inner = wide_dtype(raw.dtype), raw
        if raw.dtype != dtype:
            inner = self.block("inner", raw, dtype).copy_(raw)
        if self._bend is not None:
            inner = torch.mul(inner, self._gain, out=self.block("inner", raw, dtype))
            self._bend(inner)
        exponent = self.block("exponent", raw, dtype)
        if self._tame:
            base = torch.full((), -self._middle * self._octaves, dtype=dtype, device=raw.device)
        else:
            highest = inner.amax(-1, keepdim=True)
            if bool((highest.abs() * abs(self._octaves) > _FAR_OCTAVES).any()):
                return inner, torch.sub(inner, highest, out=exponent).mul_(self._octaves)
            base = highest.mul_(-self._octaves)
        return inner, torch.add(base, inner, alpha=self._octaves, out=exponent)

    def powers(self, exponent: Tensor) -> tuple[Tensor, Tensor]:
        """(2 ** exponent beside it, its sum over each row, n 1)."""
        power = torch.exp2(exponent, out=self.block("power", exponent, exponent.dtype))
        return power, power.sum(-1, keepdim=True)

    def close(
        self, by_logit: Tensor, inner: Tensor, raw: Tensor, factor: Tensor | None = None
    ) -> None:
        """Writes the gradient by `raw` over it, given slope x the gradient by the logits.

        `by_logit` (n V), which is written over, is multiplied by `factor` (n 1) where given.
        """
        if self._bend is not None:
            self._unbend(by_logit, inner, grad_input=by_logit)
        if factor is None:
            raw.copy_(by_logit)
        elif raw.dtype == by_logit.dtype:
            torch.mul(by_logit, factor, out=raw)
        else:
            raw.copy_(by_logit.mul_(factor))


@dataclass(frozen=True)
class _Work:
    """What to do with hidden states and head, once and, for a retained graph, again."""

    rows: Tensor
    score: RowScore
    chunk: int
    hidden_wanted: bool
    head_wanted: bool


class _Context(Protocol):
    """What autograd hands to both passes, and what the forward pass leaves in it."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor]
    ready: list[Tensor | None] | None
    work: _Work

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _LinearRows(torch.autograd.Function):
    """Sums of a row loss of hidden @ head.T, with both gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, head: Tensor, rows: Tensor, score: RowScore, chunk: int
    ) -> Tensor:
        work = _Work(rows, score, chunk, *ctx.needs_input_grad[:2])
        sums, *gradients = _accumulate(hidden, head, work)
        if work.hidden_wanted or work.head_wanted:
            ctx.save_for_backward(hidden, head)
            ctx.ready, ctx.work = gradients, work
        return sums.to(wide_dtype(hidden.dtype))

    @staticmethod
    def backward(ctx: _Context, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        # Scaled in place and given away the first time; a retained graph makes them anew.
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            _, *gradients = _accumulate(*ctx.saved_tensors, ctx.work)
        if grad_sums.is_cuda or grad_sums[0] != 1.0:
            gradients = [None if g is None else g.mul_(grad_sums[0]) for g in gradients]
        by_hidden, by_head = gradients
        return by_hidden, by_head, None, None, None


def linear_sums(
    prediction: LinearPrediction, rows: Tensor, score: RowScore, chunk: int | None
) -> Tensor:
    """The sums of `score` over the chosen flat positions; the first carries the gradient.

    Autocast is left aside: what is multiplied is in the hidden states' type.

    Args:
        prediction: hidden states B T D and head V D, unembedded in the hidden states' type.
        rows: n int64, flat positions of (B T), each at most once.
        score: the loss of a span of those rows.
        chunk: rows unembedded at once; None for as many as make about 16 million logits, or
            up to 256 of a larger vocabulary.

    Raises:
        ConfigError: `chunk` is not positive.
    """
    hidden, head = prediction.hidden, prediction.head.to(prediction.hidden.dtype)
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    size = _chunk_rows(chunk, head.shape[0], head.device)
    with without_autocast(hidden.device):
        sums: Tensor = _LinearRows.apply(hidden, head, rows, score, size)
    return sums


def _accumulate(
    hidden: Tensor, head: Tensor, work: _Work
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(sums, gradient by hidden, gradient by head) over all chunks of rows."""
    flat, rows, chunk = hidden.flatten(0, 1), work.rows, work.chunk
    whole = len(rows) == len(flat)
    sums = flat.new_zeros(work.score.size, dtype=torch.float64)
    quick = product_dtype(head)
    buffer = head.new_empty(min(chunk, len(rows)), head.shape[0], dtype=quick)
    grad_hidden = (
        (torch.empty_like if whole else torch.zeros_like)(flat) if work.hidden_wanted else None
    )
    # Many small terms vanish in a bfloat16 sum, so several chunks are added up in float32.
    dtype = quick if len(rows) <= chunk else wide_dtype(head.dtype)
    grad_head = torch.empty_like(head, dtype=dtype) if work.head_wanted else None
    if grad_head is not None and len(rows) == 0:
        grad_head.zero_()
    for start in range(0, len(rows), chunk):
        span = slice(start, min(start + chunk, len(rows)))
        chosen = (flat[span] if whole else flat[rows[span]]).to(quick)
        raw = unembed(chosen, head, buffer[: len(chosen)])
        sums += work.score(raw, span, work.hidden_wanted or work.head_wanted).sum(0)
        if grad_hidden is not None:
            grad_hidden[span if whole else rows[span]] = embed(raw, head).to(flat.dtype)
        if grad_head is not None:
            add_outer(grad_head, raw, chosen, first=start == 0)
    del buffer
    return (
        sums,
        None if grad_hidden is None else grad_hidden.view_as(hidden),
        None if grad_head is None else grad_head.to(head.dtype),
    )


class _LogitRows(torch.autograd.Function):
    """Sums of a row loss of logits that are at hand, with their gradient made beside them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, score: RowScore, span: slice) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        raw = logits.to(wide_dtype(logits.dtype), copy=wanted)
        sums = score(raw, span, wanted).sum(0)
        if wanted:
            ctx.save_for_backward(raw)
            ctx.dtype = logits.dtype
        return sums.to(raw.dtype)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_sums[0]).to(ctx.dtype), None, None


def row_sums(prediction: Prediction, rows: Tensor, score: RowScore, chunk: int | None) -> Tensor:
    """The sums of `score` over the chosen flat positions; the first carries the gradient.

    Args:
        prediction: a `LinearPrediction` goes through `linear_sums`; any other is asked for its
            logits chunk by chunk, and again in the backward pass.
        rows: n int64, flat positions of (B T), each at most once.
        score: the loss of a span of those rows.
        chunk: rows whose logits exist at once; None for as many as make about 16 million logits
            (512 where the vocabulary is not known beforehand).

    Raises:
        ConfigError: `chunk` is not positive.
    """
    if isinstance(prediction, LinearPrediction):
        return linear_sums(prediction, rows, score, chunk)

    def scored(start: int, stop: int) -> Tensor:
        logits = prediction.logits(rows[start:stop])
        sums: Tensor = _LogitRows.apply(logits, score, slice(start, stop))
        return sums

    step = _chunk_rows(chunk, _CHUNK_ELEMENTS["cpu"] // 512, rows.device)
    sums = torch.zeros(score.size, device=rows.device)
    if len(rows) == 0:  # no loss, but a gradient of 0 for whatever asks for it
        return sums + prediction.logits(rows).sum() * 0.0
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        sums = sums + checkpoint(scored, start, stop, use_reentrant=False, preserve_rng_state=False)
    return sums


@torch.no_grad()
def row_terms(prediction: Prediction, rows: Tensor, score: RowScore, chunk: int | None) -> Tensor:
    """n size float64: the terms of every chosen row, without a gradient; see `row_sums`."""
    linear = prediction if isinstance(prediction, LinearPrediction) else None
    vocabulary = _CHUNK_ELEMENTS["cpu"] // 512 if linear is None else linear.head.shape[0]
    step = _chunk_rows(chunk, vocabulary, rows.device)
    terms = torch.zeros(len(rows), score.size, dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), step):
        span = slice(start, min(start + step, len(rows)))
        if linear is not None:
            hidden = linear.hidden.flatten(0, 1)[rows[span]]
            head = linear.head.to(hidden.dtype)
            hidden = hidden.to(product_dtype(head))
            raw = hidden.new_empty(len(hidden), len(head))
            with without_autocast(hidden.device):
                unembed(hidden, head, raw)
        else:
            raw = wide(prediction.logits(rows[span]))
        terms[span] = score(raw, span, False)
    return terms


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "a chunked loss has no second derivative (create_graph=True was asked for); "
            "compute this loss from prediction.logits instead"
        )


def _chunk_rows(chunk: int | None, vocabulary: int, device: torch.device) -> int:
    if chunk is None:
        elements = _CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
        return max(1, elements // vocabulary, min(_FEW_ROWS, 4 * elements // vocabulary))
    if chunk < 1:
        raise ConfigError(f"chunk must be at least 1 row, got {chunk}")
    return chunk


def blocks(raw: Tensor) -> Iterator[slice]:
    """Slices of rows that are worked on at once."""
    elements = _BLOCK_ELEMENTS["cuda" if raw.is_cuda else "cpu"]
    step = max(1, elements // raw.shape[1])
    for start in range(0, len(raw), step):
        yield slice(start, min(start + step, len(raw)))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 for float64: what losses are computed in."""
    return torch.promote_types(dtype, torch.float32)


def wide(logits: Tensor) -> Tensor:
    """The same numbers in `wide_dtype`."""
    return logits.to(wide_dtype(logits.dtype))
