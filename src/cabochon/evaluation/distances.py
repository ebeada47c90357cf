"""How far two policies are apart: distances of their distributions over whole responses.

Conventions:

- A response is what a policy writes after a prompt at temperature 1 with no cut, up to a stop token
  or the length limit. Both policies are held to the same limit; the stop token counts.
- KL(p || q) = E_{y ~ p} sum_t KL(p(. | x, y_<t) || q(. | x, y_<t)), the chain rule. At every
  position of responses drawn from p the divergence over the whole vocabulary is taken, which
  varies far less than log p(y) - log q(y) does, and is never below 0. Reverse KL is the same with
  the two policies exchanged, and so needs responses of the other.
- The Jensen-Shannon divergence of sequences is that to the mixture of *sequences*,
  m(y) = (p(y) + q(y)) / 2, which no chain rule takes apart. It is estimated by
  log p(y) - log m(y), which never exceeds log 2. `token_js` is another number: the mean over
  positions of the divergence of the two next-token distributions.
- Figures are nats for a whole response (`token_js`: nats for a token), the mean over prompts, with
  a 95% bootstrap interval over prompts. Each prompt's responses are averaged first.

Source: Tiapkin et al. 2025, arXiv:2502.02671, section 3 (proxy and golden metrics).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import Group, Policy, TokenBatch
from cabochon.core.errors import DataError, NonFinite, TokenizerMismatch
from cabochon.evaluation.intervals import Interval, mean_interval
from cabochon.generation.modes import device_of, evaluating
from cabochon.generation.score import score
from cabochon.losses.f_divergences import KL, FDivergence, JensenShannon, divergence

__all__ = ["Change", "Distance", "change", "sequence_js", "sequence_kl", "token_js"]

ROWS_OF_LOGITS = 512
"""Positions whose logits exist at a time."""
AGREEMENT = 1e-3
"""Nats by which two log-probabilities of one token may differ through rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The distance of two policies, prompt by prompt."""

    prompts: tuple[float, ...]
    """P: nats."""

    @property
    def mean(self) -> float:
        """Over the prompts."""
        return math.fsum(self.prompts) / len(self.prompts)

    @property
    def interval(self) -> Interval | None:
        """95%, of the mean; None with a single prompt, which tells of no other."""
        return mean_interval(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a distance has moved, paired prompt by prompt."""

    mean: float
    """Later minus earlier, nats."""
    interval: Interval | None
    """95%, of the mean."""

    @property
    def risen(self) -> bool:
        """True if the whole interval is above 0."""
        return self.interval is not None and self.interval[0] > 0.0

    @property
    def fallen(self) -> bool:
        """True if the whole interval is below 0."""
        return self.interval is not None and self.interval[1] < 0.0


def change(earlier: Distance, later: Distance) -> Change:
    """The later distance minus the earlier one, on the same prompts.

    Pairing removes what makes some prompts harder than others for any model.

    Raises:
        DataError: they are of different numbers of prompts.
    """
    if len(earlier.prompts) != len(later.prompts):
        raise DataError(
            f"one distance is of {len(earlier.prompts)} prompts, the other of {len(later.prompts)} "
            "prompts; measure both on the same"
        )
    moved = [b - a for a, b in zip(earlier.prompts, later.prompts, strict=True)]
    return Change(mean=math.fsum(moved) / len(moved), interval=mean_interval(moved))


def sequence_kl(p: Policy, q: Policy, from_p: Sequence[Group], *, rows: int = 16) -> Distance:
    """KL(p || q) of whole responses, by the conventions of this module.

    Forward KL of a student is `sequence_kl(teacher, student, responses of the teacher)`, its
    reverse KL `sequence_kl(student, teacher, responses of the student)`.

    Args:
        p: read in evaluation mode and without gradients.
        q: likewise; of the same vocabulary.
        from_p: prompts with responses that p drew at temperature 1.
        rows: how many responses are read at a time; it changes no result beyond rounding.

    Raises:
        DataError: no prompt, one without a response, or responses drawn at another temperature.
        TokenizerMismatch: the two predict different numbers of tokens.
        NonFinite: a prompt whose distance is NaN or infinite.
    """
    return _of_prompts(from_p, _along(KL(), p, q, from_p, rows, per_token=False))


def token_js(
    p: Policy, q: Policy, from_p: Sequence[Group], from_q: Sequence[Group], *, rows: int = 16
) -> Distance:
    """The mean Jensen-Shannon divergence of the next-token distributions, at most log 2 nats.

    Half of the prefixes are those of p, half those of q; a response counts as the mean over its
    positions. Arguments and errors are those of `sequence_js`.
    """
    law = JensenShannon(0.5, "paper")
    halves = [
        _of_prompts(groups, _along(law, p, q, groups, rows, per_token=True))
        for groups in (from_p, from_q)
    ]
    return _mean_of(*halves)


def sequence_js(
    p: Policy, q: Policy, from_p: Sequence[Group], from_q: Sequence[Group], *, rows: int = 16
) -> Distance:
    """KL(p || m) / 2 + KL(q || m) / 2 of whole responses, m = (p + q) / 2: at most log 2 nats.

    Estimated by log p(y) - log m(y): symmetric, and exact in expectation, but a prompt's figure
    may be below 0, and where the two hardly overlap it sits at log 2.

    Args:
        p: read in evaluation mode and without gradients.
        q: likewise; of the same vocabulary.
        from_p: prompts with responses that p drew at temperature 1.
        from_q: the same prompts with responses of q.
        rows: how many responses are read at a time.

    Raises:
        DataError: as `sequence_kl`; or the two lists are not of the same prompts.
        NonFinite: a response that its own policy gives no probability.
    """
    same = len(from_p) == len(from_q) and all(
        torch.equal(one.prompt, other.prompt) for one, other in zip(from_p, from_q, strict=True)
    )
    if not same:
        raise DataError("the responses of p and of q must be to the same prompts, in one order")
    halves = []
    for own, other, groups in ((p, q, from_p), (q, p, from_q)):
        _check(groups)
        mine, others = score(own, groups, rows=rows), score(other, groups, rows=rows)
        halves.append(
            _of_prompts(
                groups,
                (
                    _to_mixture(one.double().sum(), two.double().sum())
                    for a, b in zip(mine, others, strict=True)
                    for one, two in zip(a, b, strict=True)
                ),
            )
        )
    return _mean_of(*halves)


def _to_mixture(own: Tensor, other: Tensor) -> float:
    """Log p(y) - log m(y) of one response, from the two log-probabilities."""
    return float(own - torch.logaddexp(own, other)) + math.log(2.0)


@torch.no_grad()
def _along(
    law: FDivergence, p: Policy, q: Policy, groups: Sequence[Group], rows: int, *, per_token: bool
) -> Iterator[float]:
    """The divergence of the next token, summed or averaged over the positions of each response."""
    pairs = [(group.prompt, c.tokens) for group in groups for c in group.completions]
    with evaluating(p), evaluating(q):
        for start in range(0, len(pairs), rows):
            some = pairs[start : start + rows]
            batch = TokenBatch.of(
                [torch.cat([prompt.cpu(), written.cpu()]) for prompt, written in some],
                masks=[[False] * len(x) + [True] * len(y) for x, y in some],
            )
            values = _values(law, p, q, batch, some[0][0])
            for one in values.split([len(written) for _, written in some]):
                total = float(one.sum())
                yield total / len(one) if per_token else total


def _values(law: FDivergence, p: Policy, q: Policy, batch: TokenBatch, like: Tensor) -> Tensor:
    """n float64: the divergence at each counted position, row after row."""
    here, there = device_of(p, like), device_of(q, like)
    first, second = p(batch.to(here)), q(batch.to(there))
    chosen = batch.mask.flatten().nonzero().flatten()
    found = []
    for some in chosen.split(ROWS_OF_LOGITS):
        p_logits, q_logits = first.logits(some.to(here)), second.logits(some.to(there)).to(here)
        if p_logits.shape[-1] != q_logits.shape[-1]:
            raise TokenizerMismatch(
                f"one policy predicts {p_logits.shape[-1]} tokens, the other "
                f"{q_logits.shape[-1]}; compare policies of one tokenizer"
            )
        found.append(divergence(law, p_logits, q_logits).double().cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _check(groups: Sequence[Group]) -> None:
    """Refuses what is no sample of a policy."""
    if not groups:
        raise DataError("no prompt to measure on; give some")
    for number, group in enumerate(groups):
        if len(group.prompt) == 0:
            raise DataError(f"prompt {number} is empty; begin with BOS")
        if not group.completions or any(len(c.tokens) == 0 for c in group.completions):
            raise DataError(f"prompt {number} has no response, or an empty one")
        for written in group.completions:
            if (written.logprob - written.model_logprob).abs().max() > AGREEMENT:
                raise DataError(
                    f"a response to prompt {number} was not drawn from the policy itself; "
                    "draw at temperature 1, without top-k and top-p"
                )


def _of_prompts(groups: Sequence[Group], values: Iterator[float]) -> Distance:
    """The mean over each prompt's responses, which come one after another."""
    _check(groups)
    means = []
    for number, group in enumerate(groups):
        own = [next(values) for _ in group.completions]
        mean = math.fsum(own) / len(own)
        if not math.isfinite(mean):
            raise NonFinite(
                f"the distance at prompt {number} is {mean} nats; look for NaN in the weights, or "
                "for a token that one policy rules out"
            )
        means.append(mean)
    return Distance(prompts=tuple(means))


def _mean_of(first: Distance, second: Distance) -> Distance:
    pairs = zip(first.prompts, second.prompts, strict=True)
    return Distance(prompts=tuple((a + b) / 2.0 for a, b in pairs))
