"""Speculative sampling: a small model proposes tokens, the large one reads them all at once.

With p the distribution that is to be drawn from and q the draft's, a proposal x is kept with
probability min(1, p(x) / q(x)); the first that is not kept is replaced by a draw from
max(0, p - q), normalised. What is written is then distributed exactly as drawn from p, whatever q.
When all proposals are kept, the logits after the last one give one token more.

Each place of a sequence has its own uniform numbers for the draft's draw, for keeping it, and for
the large model's own draw, so a sequence depends on its key, the draft and `ahead`, and on no
neighbour.

Source: Leviathan, Kalman and Matias 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023,
arXiv:2302.01318, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import Backbone, Cache, TokenBatch
from cabochon.generation.drawing import by_distribution, fail
from cabochon.generation.modes import device_of
from cabochon.generation.sample import inverse_cdf, probabilities
from cabochon.generation.writing import Token, Writing

__all__ = ["Proposals", "accepted", "judge", "propose"]


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What a draft proposes for n sequences."""

    batch: TokenBatch
    """n 1+K: each sequence's newest token, then its proposals; padding where there is no room."""
    drafted: Tensor
    """n K V float32: the distribution that each proposal was drawn from."""

    def rows(self, chosen: Tensor) -> Proposals:
        """Those of some of the sequences."""
        batch = TokenBatch(**{name: value[chosen] for name, value in vars(self.batch).items()})
        return Proposals(batch=batch, drafted=self.drafted[chosen])


def propose(draft: Backbone, cache: Cache, writings: Sequence[Writing], ahead: int) -> Proposals:
    """Up to `ahead` tokens after each sequence's newest one.

    Args:
        draft: the small model.
        cache: its own, with a row for each sequence, which holds `drafted` tokens of it: all but
            the newest one or two. It then holds all but the last proposal.
        writings: n of them.
        ahead: K, at least 1; fewer are proposed where a sequence may get no more.
    """
    # A sequence gets at most one token more than was proposed for it.
    room = torch.tensor([min(ahead, w.limit - len(w.tokens) - 1) for w in writings])
    count = max(1, int(room.max()))
    starts = torch.tensor([[writing.position] for writing in writings])
    device = device_of(draft, writings[0].prompt)
    columns, drafted = [torch.tensor([[writing.tokens[-1]] for writing in writings])], []
    for turn in range(count):
        if turn == 0:
            logits = _caught_up(draft, cache, writings, device)
        else:
            held = (turn < room).unsqueeze(1)
            batch = _batch(columns[turn], starts + turn, held).to(device)
            logits = draft(batch, cache).logits(slice(None))
        q = _drafts(logits, writings)
        uniforms = [
            writing.stream("draft")[min(len(writing.tokens) + turn, writing.limit - 1)]
            for writing in writings
        ]
        drawn = inverse_cdf(q, torch.tensor(uniforms, dtype=torch.float64, device=q.device))
        drafted.append(q)
        columns.append(drawn.cpu().unsqueeze(1))
    for writing, most in zip(writings, room.tolist(), strict=True):
        writing.drafted = writing.position + max(1, most)
    turns = torch.arange(count + 1)
    batch = _batch(torch.cat(columns, 1), starts + turns, turns <= room.unsqueeze(1))
    stacked = torch.stack(drafted, 1)
    return Proposals(batch=batch.to(stacked.device), drafted=stacked)


def _caught_up(
    draft: Backbone, cache: Cache, writings: Sequence[Writing], device: torch.device
) -> Tensor:
    """n V: the draft's logits after each sequence's newest token, all of which it has then read."""
    unread = [w.tokens[w.drafted - len(w.prompt) :] for w in writings]
    behind = torch.tensor([[len(tokens)] for tokens in unread])
    longest = int(behind.max())
    tokens = torch.tensor([each + [0] * (longest - len(each)) for each in unread])
    turns = torch.arange(longest)
    starts = torch.tensor([[writing.drafted] for writing in writings])
    batch = _batch(tokens, starts + turns, turns < behind)
    last = torch.arange(len(writings)) * longest + behind.squeeze(1) - 1
    return draft(batch.to(device), cache).logits(last.to(device))


def accepted(
    proposals: Proposals,
    logits: Tensor,
    writings: Sequence[Writing],
    distribution: tuple[float, int, float],
) -> list[list[Token]]:
    """What each sequence gets: the proposals that are kept, and one token more.

    Args:
        proposals: for n sequences, K each.
        logits: n 1+K V: of the large model, all finite or -inf.
        writings: n of them.
        distribution: temperature, top-k and top-p of them all.
    """
    count, size = proposals.drafted.shape[1:]
    p = probabilities(logits.flatten(0, 1), *distribution).view(len(writings), count + 1, size)
    proposed = proposals.batch.tokens[:, 1:]
    room = (proposals.batch.documents[:, 1:] >= 0).sum(1)
    first = [len(writing.tokens) for writing in writings]
    wanted = _uniforms(writings, "keep", first, count, p)
    p_of, q_of = (
        probs.gather(2, proposed.unsqueeze(2)).squeeze(2).double()
        for probs in (p[:, :-1], proposals.drafted)
    )
    keep = (wanted * q_of < p_of) & (torch.arange(count, device=room.device) < room.unsqueeze(1))
    kept = keep.long().cumprod(1).sum(1)
    everything = kept == room
    rows = torch.arange(len(writings), device=p.device)
    target = p[rows, kept]
    left = (target - proposals.drafted[rows, kept.clamp(max=count - 1)]).clamp_(min=0.0)
    # Rounding may leave nothing where p and q all but agree; then p itself is drawn from.
    plain = everything | (left.sum(1) <= 0.0)
    weights = torch.where(plain.unsqueeze(1), target, left)
    own = [w.stream()[at + k] for w, at, k in zip(writings, first, kept.tolist(), strict=True)]
    last = inverse_cdf(weights, torch.tensor(own, dtype=torch.float64, device=p.device))
    tokens = torch.cat([proposed, last.unsqueeze(1)], 1)
    tokens[rows, kept] = last
    return _tokens(tokens, p, logits, kept, greedy=distribution[0] == 0.0)


def judge(proposals: Proposals, logits: Tensor, writings: Sequence[Writing]) -> None:
    """Write what each sequence gets; where it ends, the rest is dropped.

    Args:
        proposals: for n sequences, K each.
        logits: n 1+K V: of the large model. A broken row is its sequence's `failure`.
        writings: n of them.
    """
    held = proposals.batch.documents >= 0
    broken = ((~logits.amax(-1).isfinite()) & held).any(1).tolist()
    for writing, bad in zip(writings, broken, strict=True):
        if bad:
            fail(writing)
    for distribution, rows in by_distribution(writings).items():
        sound = [row for row in rows if not broken[row]]
        if not sound:
            continue
        chosen = torch.tensor(sound, device=logits.device)
        some = [writings[row] for row in sound]
        written = accepted(proposals.rows(chosen), logits[chosen], some, distribution)
        for writing, tokens in zip(some, written, strict=True):
            for token in tokens:
                writing.write(token.id, token.logprob, token.model_logprob)
                if writing.finished:
                    break


def _tokens(
    tokens: Tensor, p: Tensor, logits: Tensor, kept: Tensor, *, greedy: bool
) -> list[list[Token]]:
    chosen = tokens.unsqueeze(2)
    whole = (logits.gather(2, chosen).squeeze(2) - logits.logsumexp(2)).tolist()
    drawn = whole if greedy else p.gather(2, chosen).squeeze(2).log().tolist()
    return [
        [
            Token(id=id_, logprob=logprob, model_logprob=model_logprob)
            for id_, logprob, model_logprob in zip(*columns, strict=True)
        ][: most + 1]
        for *columns, most in zip(tokens.tolist(), drawn, whole, kept.tolist(), strict=True)
    ]


def _drafts(logits: Tensor, writings: Sequence[Writing]) -> Tensor:
    """n V: each sequence's own distribution, of the draft."""
    q = torch.empty_like(logits, dtype=torch.float32)
    wanted = [writing.settings.distribution for writing in writings]
    for distribution in set(wanted):
        rows = [row for row, other in enumerate(wanted) if other == distribution]
        q[rows] = probabilities(logits[rows], *distribution)
    # Any proposal is right, so a draft that is broken proposes token 0 and is refused.
    broken = ~q.sum(1).isfinite()
    q[broken] = 0.0
    q[broken, 0] = 1.0
    return q


def _uniforms(
    writings: Sequence[Writing], purpose: str, first: Sequence[int], count: int, like: Tensor
) -> Tensor:
    """n K float64: for the next places of each sequence; those beyond its end are never used."""
    rows = [
        [float(w.stream(purpose)[min(at + turn, w.limit - 1)]) for turn in range(count)]
        for w, at in zip(writings, first, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64, device=like.device)


def _batch(tokens: Tensor, positions: Tensor, held: Tensor) -> TokenBatch:
    zeros = torch.zeros_like(tokens)
    return TokenBatch(
        tokens=tokens,
        positions=positions.masked_fill(~held, 0),
        documents=zeros.masked_fill(~held, -1),
        targets=zeros,
        mask=zeros.bool(),
    )
