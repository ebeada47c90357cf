"""From logits to a token: temperature, top-k, top-p, and a draw from a given uniform number.

All functions work on rows of logits (n V) and know nothing of models. The three cuts are applied in
the order temperature, top-k, top-p (each sees what the one before it left), and what remains is
normalised: that is the distribution really sampled from, whose log-probabilities are returned.

Ties: both cuts keep every token whose logit is at least that of the last token they must keep, so
a cut never depends on the order of the vocabulary; with ties it may keep more than k tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabochon.core.errors import ConfigError, NonFinite

__all__ = [
    "Draws",
    "broken_rows",
    "draw",
    "greedy",
    "inverse_cdf",
    "keep_top_k",
    "keep_top_p",
    "probabilities",
    "sampled_from",
    "tempered",
]

FIRST_NUCLEUS = 128
"""How many of the largest logits `keep_top_p` looks at before it looks at more."""
BLOCK = 128
"""A long row is searched for its token by blocks, then within one: sums and maxima of blocks are
ten times faster than a cumulative sum or an arg max over all of it."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One token for each row of logits."""

    tokens: Tensor
    """n int64."""
    logprob: Tensor
    """n float32, nats: under the distribution the token was drawn from."""
    model_logprob: Tensor
    """n float32, nats: under softmax(logits), at temperature 1 and with no cut."""


def greedy(logits: Tensor) -> Draws:
    """The most probable token of each row, the lowest id among equals.

    Nothing is drawn, and the point mass's own log-probability, 0 for every token, would tell
    nothing: **both log-probabilities are the model's**, under softmax(logits) at temperature 1.

    Args:
        logits: n V.

    Raises:
        NonFinite: a row has no finite largest logit.
    """
    logits = logits.float()
    highest, tokens = _first_highest(logits)
    _refuse_broken(highest)
    logprob = -(logits - highest.unsqueeze(-1)).exp_().sum(dim=-1).log_()
    return Draws(tokens=tokens, logprob=logprob, model_logprob=logprob)


def draw(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draws:
    """One token for each row, drawn by inverting the cumulative distribution at a uniform number.

    The same logits and the same uniform give the same token, whatever the other rows hold.

    Args:
        logits: n V.
        uniforms: n float64 in [0, 1).
        temperature: at least 0; 0 is `greedy` and leaves `uniforms` unused.
        top_k: how many of the most probable tokens stay; 0 keeps all.
        top_p: the mass that the most probable tokens must reach, in (0, 1]; 1 keeps all.

    Raises:
        ConfigError: a setting out of range.
        NonFinite: a row with NaN or +inf, or without any finite logit; names the rows.
    """
    if temperature == 0.0:
        return greedy(logits)
    logits = logits.float()
    _refuse_broken(logits.amax(dim=-1))
    scaled = logits if temperature == 1.0 else tempered(logits, temperature)
    cut = keep_top_p(keep_top_k(scaled, top_k), top_p)
    prob = cut.softmax(dim=-1)
    tokens = inverse_cdf(prob, uniforms)
    chosen = tokens.unsqueeze(-1)
    logprob = prob.gather(-1, chosen).log().squeeze(-1)
    if cut is logits:
        return Draws(tokens=tokens, logprob=logprob, model_logprob=logprob)
    # Not the logarithm of a probability: a hot draw may take what the model gives less than 1e-38.
    highest = logits.amax(dim=-1, keepdim=True)
    normaliser = (logits - highest).exp_().sum(dim=-1, keepdim=True).log_().add_(highest)
    model_logprob = (logits.gather(-1, chosen) - normaliser).squeeze(-1)
    return Draws(tokens=tokens, logprob=logprob, model_logprob=model_logprob)


def sampled_from(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """n V float32, nats: the whole log-distribution that `draw` draws from; -inf where cut.

    Raises:
        ConfigError: a setting out of range, or temperature 0, which is no such distribution.
        NonFinite: a row with NaN or +inf, or without any finite logit; names the rows.
    """
    _refuse_broken(logits.amax(dim=-1))
    scaled = tempered(logits, temperature)
    return keep_top_p(keep_top_k(scaled, top_k), top_p).log_softmax(dim=-1)


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """n V float32: what `draw` draws from; at temperature 0 all on the first highest.

    Rows that are broken come out as NaN, and nothing is raised.
    """
    if temperature == 0.0:
        highest, tokens = _first_highest(logits.float())
        point = torch.zeros_like(logits, dtype=torch.float32)
        point.scatter_(-1, tokens.unsqueeze(-1), 1.0)
        return point.masked_fill_(~highest.isfinite().unsqueeze(-1), torch.nan)
    scaled = logits.float() if temperature == 1.0 else tempered(logits, temperature)
    return keep_top_p(keep_top_k(scaled, top_k), top_p).softmax(dim=-1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """n V float32: (logits - row maximum) / temperature, which no temperature can overflow.

    Raises:
        ConfigError: `temperature` is not above 0.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be finite and above 0, got {temperature}")
    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    # As a float32 number the divisor may become neither 0 (0 / 0) nor infinite (-inf / inf).
    return shifted.div_(min(max(temperature, 1e-37), 1e37))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """n V: the logits, -inf for every token with less than the k-th largest of its row.

    Ties with the k-th stay. `k` = 0, or k >= V, keeps all.

    Raises:
        ConfigError: `k` is negative.
    """
    if k < 0:
        raise ConfigError(f"top_k must be at least 0 (0 keeps all tokens), got {k}")
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """n V: the logits, -inf outside the nucleus.

    The nucleus is the smallest set of most probable tokens whose mass is at least `p`, together
    with the tokens that tie with its least probable one; it always holds the most probable token.
    `p` = 1 keeps all. Masses are summed in float64.

    Raises:
        ConfigError: `p` is not in (0, 1].

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    if not 0.0 < p <= 1.0:
        raise ConfigError(f"top_p must lie in (0, 1] (1 keeps all tokens), got {p}")
    if p == 1.0:
        return logits
    size = logits.shape[-1]
    normaliser = logits.double().logsumexp(dim=-1, keepdim=True)
    # A full sort costs ten times a partial one, and the nucleus is nearly always small.
    count = min(size, FIRST_NUCLEUS)
    while True:
        largest = logits.topk(count, dim=-1).values
        mass = (largest.double() - normaliser).exp().cumsum(dim=-1)
        if count == size or bool((mass[..., -1] >= p).all()):
            break
        count = min(size, count * 8)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp_(max=count - 1)
    return logits.masked_fill(logits < largest.gather(-1, last), -torch.inf)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """n int64: for each row the first token whose cumulative weight exceeds uniform * total.

    A token of weight 0 is never returned: the cumulative sum does not rise there.

    Args:
        weights: n V, at least 0, each row with a positive finite sum; need not be normalised.
        uniforms: n in [0, 1]; float64, since float32 would never reach the last 6e-8 of a row.
    """
    blocks = _blocks(weights, 0.0)
    if blocks is None:
        return _first_above(weights, uniforms.double(), fraction=True)[0]
    block, left = _first_above(blocks.sum(dim=-1), uniforms.double(), fraction=True)
    within, _ = _first_above(_chosen(blocks, block), left, fraction=False)
    return block * BLOCK + within


def _first_above(weights: Tensor, thresholds: Tensor, *, fraction: bool) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight first exceeds the threshold (n), and the excess before it (n).

    Args:
        weights: n m.
        thresholds: n float64, a fraction of each row's total or as they are. Rounding may lift one
            up to the total itself, which nothing exceeds: it then counts as just below.
        fraction: which of the two.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1]
    wanted = thresholds * total if fraction else thresholds
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(-1)
    place = torch.searchsorted(cumulative, wanted, right=True)
    before = cumulative.gather(-1, (place - 1).clamp_(min=0)).masked_fill_(place == 0, 0.0)
    return place.squeeze(-1), (wanted - before).squeeze(-1)


def _first_highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value, its first place) of each row; NaN where there is one."""
    blocks = _blocks(logits, -torch.inf)
    if blocks is None:
        highest, place = logits.max(dim=-1)
        return highest, place
    highest, block = blocks.amax(dim=-1).max(dim=-1)
    return highest, block * BLOCK + _chosen(blocks, block).max(dim=-1).indices


def _blocks(values: Tensor, filler: float) -> Tensor | None:
    """n m BLOCK, the last one filled up; None if a row is too short for it to pay."""
    size = values.shape[-1]
    if size < 8 * BLOCK:
        return None
    if size % BLOCK:
        values = pad(values, (0, -size % BLOCK), value=filler)
    blocks: Tensor = values.unflatten(-1, (-1, BLOCK))
    return blocks


def _chosen(blocks: Tensor, block: Tensor) -> Tensor:
    """n BLOCK: one block of each row."""
    return blocks[torch.arange(len(block), device=block.device), block]


def broken_rows(logits: Tensor) -> list[int]:
    """The rows of n V logits from which nothing can be drawn: a NaN, +inf, or nothing finite."""
    return (~logits.float().amax(dim=-1).isfinite()).nonzero().flatten().tolist()


def _refuse_broken(highest: Tensor) -> None:
    """Raises for rows whose largest logit is not finite: NaN travels through a maximum."""
    finite = highest.isfinite()
    if bool(finite.all()):
        return
    rows = (~finite).nonzero().flatten().tolist()
    raise NonFinite(
        f"logits of rows {rows} hold NaN or +inf, or nothing but -inf (largest: "
        f"{highest[~finite].tolist()}); every row needs a finite largest logit to draw a token"
    )
