"""What is kept of a teacher's distribution where all of it is too much, and what that loses.

The likeliest tokens. Of p the k likeliest tokens are kept, and the probability P of the n = V - k
others together: k + 1 outcomes, about which it is exact. Against a student q that gives the others
Q together, and the least likely of them Q / (n R),

    0 <= KL(p || q) - KL of the k + 1 outcomes <= P (log n - H) + P log R,

with H the entropy of p among the others: the difference is P KL(p~ || q~) of the two conditional
distributions, and no term of it exceeds -log min q~ = log n + log R. R = 1 is a student that is
even among them; a soft-cap c on the student's logits bounds log R by 2 c. Whatever the student is,
the gradients by its logits differ by no more than 2 P in the sum of absolute values, since they
differ by P (p~ - q~) there and nowhere else.

Draws. m tokens drawn from p with replacement give the cross-entropy -sum p log q without bias;
at one position its standard error is the standard deviation of log q under p over sqrt(m), which
is that of log p where the student has become the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError, NonFinite
from cabochon.core.keys import Key
from cabochon.core.protocols import Policy, Prediction, Teacher
from cabochon.core.types import SampledTargets, TokenBatch, TopKTargets
from cabochon.data.batches import Placed, digest, documents

__all__ = [
    "Drawn",
    "Likeliest",
    "draw",
    "even_bound",
    "likeliest",
    "log_rest",
    "sampled",
    "spans",
    "top_k",
    "uniforms",
]

_ELEMENTS_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist at a time: rows x vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """The k likeliest tokens of n rows."""

    ids: Tensor
    """n k int64, the likeliest first."""
    logprob: Tensor
    """n k float32, nats."""
    tail: Tensor
    """n float32, nats: log of the probability of all others together; -inf if there are none."""
    uneven: Tensor
    """n float32, nats: P (log n - H), the most that a student even among the others is off by."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens drawn from n rows, without repetition but with their counts."""

    sizes: Tensor
    """n int64: how many different tokens came up."""
    ids: Tensor
    """sum(sizes) int64: those of the first row, ascending, then those of the second, ..."""
    counts: Tensor
    """sum(sizes) int64: how often each came up."""
    variance: Tensor
    """n float32: of log p(x) under p."""
    spread: Tensor
    """n float32: 1 - sum p^2, which over the number of draws is E |share - p|^2."""


def likeliest(logits: Tensor, k: int) -> Likeliest:
    """The k likeliest tokens and the mass of the others, each as exact as the logits.

    Args:
        logits: n V, soft-cap and temperature inside; -inf where a token is impossible.
        k: from 1 to V.

    Raises:
        ConfigError: k lies outside.
        NonFinite: a row is no distribution.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"can keep 1 to {vocabulary} tokens, the whole vocabulary; got {k}")
    law = _law(logits)
    logprob, ids = law.topk(k, dim=-1)
    rest = law.scatter(-1, ids, -math.inf)
    tail = rest.logsumexp(-1)
    mass = tail.exp()
    negative_entropy = (rest.exp() * rest.nan_to_num(neginf=0.0)).sum(-1)
    uneven = mass * math.log(max(1, vocabulary - k)) + negative_entropy
    uneven = torch.where(mass > 0, uneven - mass * tail, torch.zeros_like(mass))
    return Likeliest(ids=ids, logprob=logprob.float(), tail=tail.float(), uneven=uneven.float())


def even_bound(targets: TopKTargets, vocabulary: int) -> Tensor:
    """B T: the most that `Likeliest.uneven` can be where only the likeliest tokens are known.

    None of the others is likelier than the last one kept, so H >= log(P / p_k).
    """
    others = max(1, vocabulary - targets.ids.shape[-1])
    known = targets.logprob.masked_fill(targets.ids < 0, math.inf)
    last = known.amin(-1)
    lowest_entropy = (targets.tail - last).clamp(min=0.0)
    mass = targets.tail.exp()
    return torch.where(mass > 0, mass * (math.log(others) - lowest_entropy), mass * 0.0)


def draw(logits: Tensor, uniform: Tensor) -> Drawn:
    """Tokens drawn with replacement by inverting the distribution function.

    Args:
        logits: n V.
        uniform: n m float64 in [0, 1), which decide everything.

    Raises:
        NonFinite: a row is no distribution.
    """
    vocabulary = logits.shape[-1]
    law = _law(logits)
    prob = law.double().exp()
    upto = prob.cumsum(-1)
    chosen = torch.searchsorted(upto, uniform * upto[:, -1:], right=True)
    del upto
    beyond = (chosen == vocabulary).any(-1)
    if bool(beyond.any()):  # uniform * total was rounded up to the total: the last possible token
        last = vocabulary - 1 - (prob[beyond] > 0).byte().flip(-1).argmax(-1, keepdim=True)
        chosen[beyond] = torch.minimum(chosen[beyond], last)
    rows = torch.arange(len(chosen), device=chosen.device).unsqueeze(-1)
    flat = (chosen + vocabulary * rows).flatten().sort().values
    found, counts = flat.unique_consecutive(return_counts=True)
    prob, finite = prob.float(), law.nan_to_num_(neginf=0.0)
    mean = (prob * finite).sum(-1, keepdim=True)
    return Drawn(
        sizes=torch.bincount(found // vocabulary, minlength=len(chosen)),
        ids=found % vocabulary,
        counts=counts,
        variance=(prob * (finite - mean).square_()).sum(-1).float(),
        spread=(1.0 - prob.square_().sum(-1, dtype=torch.float64)).float(),
    )


def uniforms(key: Key, document: Placed, draws: int) -> Tensor:
    """n m float64 for the counted tokens of a document, which depend on its own tokens alone."""
    own = key.fold(digest(document.tokens).hex()).generator()
    every = torch.rand(len(document.tokens), draws, generator=own, dtype=torch.float64)
    return every[torch.from_numpy(document.counted)]


def top_k(teacher: Policy, k: int) -> Teacher:
    """A policy as a teacher that says its k likeliest tokens and the mass of the others."""

    @torch.no_grad()
    def targets(batch: TokenBatch, /) -> TopKTargets:
        prediction = teacher(batch)
        size, device = batch.mask.numel(), batch.mask.device
        ids = torch.full((size, k), -1, device=device)
        logprob = torch.full((size, k), -math.inf, device=device)
        tail = torch.full((size,), math.nan, device=device)
        rows = batch.mask.flatten().nonzero().squeeze(1)
        for some in spans(prediction, rows):
            found = likeliest(prediction.logits(some), k)
            ids[some], logprob[some], tail[some] = found.ids, found.logprob, found.tail
        shape = batch.shape
        return TopKTargets(
            ids=ids.view(*shape, k), logprob=logprob.view(*shape, k), tail=tail.view(shape)
        )

    return targets


def sampled(teacher: Policy, draws: int, key: Key) -> Teacher:
    """A policy as a teacher that draws at every position, always the same for a document."""

    @torch.no_grad()
    def targets(batch: TokenBatch, /) -> SampledTargets:
        prediction = teacher(batch)
        size, device = batch.mask.numel(), batch.mask.device
        ids = torch.full((size, draws), -1, device=device)
        share = torch.zeros((size, draws), device=device)
        for document in documents(batch):
            rows = torch.from_numpy(document.flat[document.counted]).to(device)
            uniform = uniforms(key, document, draws).to(device)
            done = 0
            for some in spans(prediction, rows):
                found = draw(prediction.logits(some), uniform[done : done + len(some)])
                done += len(some)
                at = some.repeat_interleave(found.sizes)
                first = found.sizes.cumsum(0) - found.sizes
                place = torch.arange(len(at), device=device) - first.repeat_interleave(found.sizes)
                ids[at, place] = found.ids
                share[at, place] = found.counts / draws
        shape = (*batch.shape, draws)
        return SampledTargets(ids=ids.view(shape), share=share.view(shape))

    return targets


def spans(prediction: Prediction, rows: Tensor) -> Iterator[Tensor]:
    """`rows` in parts whose logits fit into memory."""
    if len(rows) == 0:
        return
    vocabulary = prediction.logits(rows[:1]).shape[-1]
    kind = "cuda" if rows.is_cuda else "cpu"
    yield from rows.split(max(1, _ELEMENTS_AT_ONCE[kind] // vocabulary))


def log_rest(logprob: Tensor) -> Tensor:
    """log(1 - p) from log p <= 0, as exact near p = 1 as near p = 0."""
    near_one = torch.log(-torch.expm1(logprob))
    return torch.where(logprob > -math.log(2.0), near_one, torch.log1p(-logprob.exp()))


def _law(logits: Tensor) -> Tensor:
    law = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    if bool(law.isnan().any()):
        row = int(law.isnan().any(-1).nonzero()[0])
        raise NonFinite(
            f"the teacher's logits have no distribution (row {row} of {len(law)} holds NaN or "
            "inf); look at its weights and precision"
        )
    return law
