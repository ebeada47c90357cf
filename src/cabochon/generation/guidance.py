"""Classifier-free guidance: two streams of one text, combined before a token is drawn.

The conditional stream reads the prompt, the other one a weaker prompt (nothing but BOS, or what
the text should *not* be); both go on with the same completion. With z their logits, soft-caps
inside each, and gamma the strength, the next token is drawn from

    log p_gamma(y_n | y_<n, x) = gamma z(y_n | y_<n, x) + (1 - gamma) z(y_n | y_<n, x') - log Z

so gamma = 1 is the conditional model, 0 the other one, and above 1 what the prompt makes more
probable becomes more probable still. It is the teacher of diversity-rewarded CFG distillation.

    guided = Guided(model, 3.0, always(torch.tensor([bos])))
    groups = generate(guided, prompts, Settings(), Key(0))      # the engine, with two caches
    prediction = guided(batch)                                  # a policy: scoring, distilling

Where a prompt ends is known without being told: with a cache it is what a row has read when its
first prediction is asked for; in a batch it is what precedes the first target that counts.

Source: Ho and Salimans 2022, arXiv:2207.12598; for language models Sanchez et al. 2023,
arXiv:2306.17806; as a teacher Cideron et al. 2025, arXiv:2410.06084.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cabochon.core import Backbone, Cache, Prediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError

__all__ = ["Guided", "GuidedCache", "GuidedPrediction", "Unprompted", "always", "guided_logits"]


@dataclass(frozen=True, kw_only=True)
class Unprompted:
    """Which prompt the other stream reads in place of each."""

    of: Callable[[Tensor], Tensor]
    """Prompt (T int64) to the other prompt (at least one token, on any device)."""
    longest: int
    """The most tokens that `of` returns: so much more room the other stream's cache gets."""

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ConfigError(
                f"the other prompt has at most {self.longest} tokens; it needs at least one (BOS)"
            )

    def __call__(self, prompt: Tensor) -> Tensor:
        other = self.of(prompt)
        if other.ndim != 1 or not 1 <= len(other) <= self.longest:
            raise DataError(
                f"the other prompt of a prompt of {len(prompt)} tokens has shape "
                f"{tuple(other.shape)}; expected one row of 1 to {self.longest} tokens"
            )
        return other


def always(prompt: Tensor) -> Unprompted:
    """The same other prompt for all: BOS alone, or one negative prompt."""
    return Unprompted(of=lambda _: prompt, longest=len(prompt))


def guided_logits(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """n V float32: log-probabilities of the combination; see the module.

    They are the limit where a logit is -inf: what the conditional stream excludes stays excluded.
    Strength 1 and 0 give the streams' own logits back, bit for bit.

    Args:
        conditional: n V.
        unconditional: n V.
        strength: gamma, at least 0.

    Raises:
        DataError: the streams have different vocabularies.
    """
    if strength in (0.0, 1.0):
        return conditional if strength else unconditional
    _check_vocabulary(conditional, unconditional)
    first, second = conditional.float().log_softmax(-1), unconditional.float().log_softmax(-1)
    combined = strength * first + (1.0 - strength) * second
    return combined.masked_fill(first == -torch.inf, -torch.inf).log_softmax(-1)


def _check_vocabulary(conditional: Tensor, unconditional: Tensor) -> None:
    if conditional.shape[-1] != unconditional.shape[-1]:
        raise DataError(
            f"the conditional stream has a vocabulary of {conditional.shape[-1]} tokens, the other "
            f"one of {unconditional.shape[-1]}; guidance needs models of one tokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class GuidedPrediction:
    """Combined logits for the positions that both streams know: those of the completion."""

    conditional: Prediction
    unconditional: Prediction | None
    """None where no row of the batch has a completion yet."""
    place: Tensor
    """(B T) int64: the position in the flattened unconditional batch; -1 within a prompt."""
    strength: float

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: the combination at the chosen rows of the flattened (B T) positions.

        Raises:
            DataError: a row within a prompt, where the other stream has nothing to predict.
        """
        place = self.place[rows]
        if self.unconditional is None or bool((place < 0).any()):
            raise DataError(
                "a guided prediction was asked for within a prompt, where the unconditional "
                "stream reads something else; ask for the rows that the batch's mask counts"
            )
        return guided_logits(
            self.conditional.logits(rows), self.unconditional.logits(place), self.strength
        )


class GuidedCache:
    """The past of both streams, and the prompts of rows whose first prediction is still to come."""

    def __init__(self, conditional: Cache, unconditional: Cache, rows: int, ahead: int = 0) -> None:
        self.conditional = conditional
        self.unconditional = unconditional
        self.ahead = ahead
        """How many of a row's newest tokens `rewind` may take back."""
        self.pending: list[Tensor | None] = [None] * rows
        """Each row's prompt so far; None once the unconditional stream has begun."""
        self.lengths = [0] * rows
        """Tokens of each row that the unconditional stream holds."""
        self.read_lengths = [0] * rows
        """Tokens of each row that the conditional stream holds."""

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.conditional.capacity

    def read(self, batch: TokenBatch) -> None:
        """Keep the new tokens of the rows that are still in their prompts."""
        held = batch.documents >= 0
        counts, firsts = held.sum(1).tolist(), held.long().argmax(1)
        starts = batch.positions.gather(1, firsts.unsqueeze(1)).squeeze(1).tolist()
        for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
            if count:
                self.read_lengths[row] = start + count
            before = self.pending[row]
            if not count or (start and before is None):
                continue
            new = batch.tokens[row, held[row]]
            self.pending[row] = torch.cat([before, new]) if start and before is not None else new

    def select(self, rows: Tensor) -> GuidedCache:
        """This cache, with the past of the chosen rows, in that order; one may be chosen twice."""
        chosen = rows.tolist()
        selected = GuidedCache(
            self.conditional.select(rows), self.unconditional.select(rows), len(chosen), self.ahead
        )
        selected.pending = [self.pending[row] for row in chosen]
        selected.lengths = [self.lengths[row] for row in chosen]
        selected.read_lengths = [self.read_lengths[row] for row in chosen]
        return selected

    def put(self, rows: Tensor, other: GuidedCache, sources: Tensor) -> None:
        """Let `rows` hold what `sources` of another cache hold; rows after the last are new."""
        self.conditional.put(rows, other.conditional, sources)
        self.unconditional.put(rows, other.unconditional, sources)
        for place, source in zip(rows.tolist(), sources.tolist(), strict=True):
            missing = place + 1 - len(self.pending)
            self.pending += [None] * missing
            self.lengths += [0] * missing
            self.read_lengths += [0] * missing
            self.pending[place] = other.pending[source]
            self.lengths[place] = other.lengths[source]
            self.read_lengths[place] = other.read_lengths[source]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Take the newest tokens of each row, which both streams have read, back."""
        shorter = [
            held and held - before + length  # at strength 1 the other stream has read nothing
            for held, before, length in zip(self.lengths, self.read_lengths, lengths, strict=True)
        ]
        self.conditional.rewind(lengths)
        self.unconditional.rewind(shorter)
        self.lengths, self.read_lengths = shorter, list(lengths)


class Guided(nn.Module):
    """A backbone whose predictions are those of two streams, combined.

    A module, so that the engine finds its device and its parts' modes; it has no parameters of its
    own, and two streams of one model share that model.
    """

    def __init__(
        self,
        model: Backbone,
        strength: float,
        unprompted: Unprompted,
        *,
        unconditional: Backbone | None = None,
    ) -> None:
        """Guide `model`.

        Args:
            model: reads the prompts.
            strength: gamma; 1 is the model itself, which then runs alone.
            unprompted: what the other stream reads instead of a prompt.
            unconditional: the model of the other stream; `model` itself when absent. Both have
                one vocabulary.

        Raises:
            ConfigError: `strength` negative or not finite, or no room behind the other prompt.
        """
        super().__init__()
        if not 0.0 <= strength < math.inf:
            raise ConfigError(f"the strength of guidance is {strength}; it must be at least 0")
        self.conditional = model
        self.unconditional = model if unconditional is None else unconditional
        self.strength = float(strength)
        self.unprompted = unprompted
        if self.context < 2:
            raise ConfigError(
                f"the other prompt has up to {unprompted.longest} tokens, its model a context of "
                f"{self.unconditional.context}; shorten it so that a completion fits behind it"
            )

    @property
    def context(self) -> int:
        """The longest document for which neither stream outgrows its model's context."""
        # A completion has at least one token less than its document: that is the prompt's.
        other = self.unconditional.context - self.unprompted.longest + 1
        return min(self.conditional.context, other)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> GuidedCache:
        """An empty cache for `rows` sequences of at most `capacity` tokens.

        Its `rewind` can take back up to `ahead` tokens of a row.
        """
        # A completion may take all of the capacity, behind a longer prompt than the row's own.
        other = min(self.unconditional.context, capacity + self.unprompted.longest)
        return GuidedCache(
            self.conditional.new_cache(rows, capacity, ahead),
            self.unconditional.new_cache(rows, other, ahead),
            rows,
            ahead,
        )

    def forward(self, batch: TokenBatch, cache: GuidedCache | None = None) -> Prediction:
        """Predictions at every position of the batch that is not within a prompt.

        Without a cache the prompts end where `batch.mask` says: a document's first counted target
        is the first token of its completion.

        Raises:
            DataError: the other prompt is empty or too long.
        """
        if cache is None:
            return self._whole(batch)
        conditional = self.conditional(batch, cache.conditional)
        cache.read(batch)
        if self.strength == 1.0:
            return conditional
        return self._continued(batch, conditional, cache)

    def _whole(self, batch: TokenBatch) -> Prediction:
        conditional = self.conditional(batch)
        if self.strength == 1.0:
            return conditional
        place = torch.full_like(batch.tokens, -1)
        sequences, spans = [], []
        for row, columns, begin in _completions(batch):
            tokens = batch.tokens[row, columns]
            other = self.unprompted(tokens[: begin + 1]).to(tokens)
            sequences.append(torch.cat([other, tokens[begin + 1 :]]).cpu())
            spans.append((row, columns[begin:], len(other) - 1))
        if not sequences:
            return GuidedPrediction(
                conditional=conditional,
                unconditional=None,
                place=place.flatten(),
                strength=self.strength,
            )
        other_batch = TokenBatch.of(sequences).to(batch.tokens.device)
        for number, (row, columns, start) in enumerate(spans):
            first = number * other_batch.shape[1] + start
            place[row, columns] = torch.arange(first, first + len(columns), device=place.device)
        return GuidedPrediction(
            conditional=conditional,
            unconditional=self.unconditional(other_batch),
            place=place.flatten(),
            strength=self.strength,
        )

    def _continued(
        self, batch: TokenBatch, conditional: Prediction, cache: GuidedCache
    ) -> Prediction:
        held = batch.documents >= 0
        begun = torch.tensor([prompt is None for prompt in cache.pending], device=held.device)
        going = held & begun.unsqueeze(1)
        unconditional = None
        if bool(going.any()):
            starts = torch.tensor(cache.lengths, device=held.device).unsqueeze(1)
            following = TokenBatch(
                tokens=batch.tokens,
                positions=(starts + going.cumsum(1) - 1).clamp(min=0),
                documents=going.long() - 1,
                targets=batch.targets,
                mask=torch.zeros_like(going),
            )
            unconditional = self.unconditional(following, cache.unconditional)
            for row, count in enumerate(going.sum(1).tolist()):
                cache.lengths[row] += count
        return _Continued(
            conditional=conditional,
            unconditional=unconditional,
            going=going,
            padding=~held,
            prompts=list(cache.pending),
            last=held.shape[1] - 1 - held.flip(1).long().argmax(1),
            guided=self,
            cache=cache,
        )

    def begin(self, rows: Sequence[int], cache: GuidedCache, device: torch.device) -> Tensor:
        """Read the other prompts of `rows`, whose own are complete: n V, what may follow them."""
        others = {}
        for row in rows:
            prompt = cache.pending[row]
            assert prompt is not None
            others[row] = self.unprompted(prompt).cpu()
            cache.pending[row], cache.lengths[row] = None, len(others[row])
        absent = torch.zeros(1, dtype=torch.int64)
        count = len(cache.pending)
        # As many columns as make this the reading of a prompt, for which no weights are laid out.
        wide = torch.zeros(cache.ahead + 2, dtype=torch.int64)
        batch = TokenBatch.of([*(others.get(row, absent) for row in range(count)), wide])
        batch = batch.rows(0, count)
        batch.documents[[row for row in range(count) if row not in others]] = -1
        prediction = self.unconditional(batch.to(device), cache.unconditional)
        ends = [row * batch.shape[1] + len(others[row]) - 1 for row in rows]
        return prediction.logits(torch.tensor(ends, device=device))


@dataclass(frozen=True, kw_only=True)
class _Continued:
    """Combined logits for new tokens in a cache.

    Asking for the last token of a row that is still in its prompt is what says that the prompt
    ends there: the other stream reads its own prompt then.
    """

    conditional: Prediction
    unconditional: Prediction | None
    going: Tensor
    """B T bool: the other stream has read this token too."""
    padding: Tensor
    """B T bool: no token; what is predicted there means nothing."""
    prompts: list[Tensor | None]
    """As the cache had them when these tokens were read."""
    last: Tensor
    """B int64: each row's last new token."""
    guided: Guided
    cache: GuidedCache
    begun: dict[int, Tensor] = field(default_factory=dict)
    """What may follow the other prompts that were read for this prediction: V each."""

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: the combination at the chosen rows of the flattened (B T) positions."""
        flat = torch.arange(self.going.numel(), device=self.going.device)[rows]
        conditional = self.conditional.logits(rows)
        ends = ~(self.going | self.padding).flatten()[flat]
        at = self._ends(flat[ends])
        if self.unconditional is None and not at:
            return conditional  # nothing, or padding alone
        new = list(dict.fromkeys(row for row in at if row not in self.begun))
        if new:
            following = self.guided.begin(new, self.cache, flat.device)
            self.begun.update(zip(new, following, strict=True))
        if self.unconditional is None:
            unconditional = conditional.clone()
        else:
            unconditional = self.unconditional.logits(flat)
        if at:
            _check_vocabulary(conditional, self.begun[at[0]])
            unconditional[ends] = torch.stack([self.begun[row] for row in at])
        return guided_logits(conditional, unconditional, self.guided.strength)

    def _ends(self, flat: Tensor) -> list[int]:
        """The rows that these positions are the last new token of."""
        rows, columns = flat // self.going.shape[1], flat % self.going.shape[1]
        if bool((columns != self.last[rows]).any()):
            raise DataError(
                "a guided prediction was asked for within a prompt, where the unconditional "
                "stream reads something else; ask for a prompt's last token"
            )
        found = rows.tolist()
        for row in found:
            if row not in self.begun and self.cache.pending[row] is not self.prompts[row]:
                raise DataError(
                    f"row {row} has read on since this prediction was made; ask for the logits "
                    "after a prompt before the next tokens go in"
                )
        return found


def _completions(batch: TokenBatch) -> Iterator[tuple[int, Tensor, int]]:
    """Row, columns, and the place among them of the prompt's last token, for every completion."""
    for row, (documents, mask) in enumerate(zip(batch.documents, batch.mask, strict=True)):
        for document in documents[mask].unique().tolist():
            columns = (documents == document).nonzero().flatten()
            yield row, columns, int(mask[columns].long().argmax())
