"""Slots in which completions are written side by side, and which never wait for one another.

A prompt is read, the samples of it that find a free slot share that reading, and each step draws
one token in every slot (several with a draft model). A finished sequence leaves at once, and the
next prompt is read into its slot while the others go on.

    engine = Engine(model, slots=32)                # prompts that come and go
    (writing,) = engine.add(prompt, Settings(), Key(0))
    while not writing.finished:
        engine.step()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from cabochon.core import Backbone, Cache, Key, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.drawing import draw_each
from cabochon.generation.modes import device_of, evaluating
from cabochon.generation.settings import Settings
from cabochon.generation.speculation import judge, propose
from cabochon.generation.writing import Writing, begin

__all__ = ["Engine"]


@dataclass(eq=False)
class _Reading:
    """A prompt on its way into slots."""

    prompt: Tensor
    waiting: deque[Writing]
    """Its samples that have no slot yet."""
    caches: list[Cache] = field(default_factory=list)
    """Of the model, and of the draft model; the prompt is one row of them."""
    row: int = 0
    done: int = 0
    """Tokens read."""
    logits: Tensor | None = None
    """1 V: after the prompt."""


class Engine:
    """Writes completions in slots that never wait for one another.

    The model's parameters are used where they are: an update is seen by the next step.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        slots: int = 32,
        capacity: int | None = None,
        prefill: int = 2048,
        draft: Backbone | None = None,
        ahead: int = 4,
    ) -> None:
        """Nothing is allocated before the first prompt is read.

        Args:
            model: what predicts.
            slots: sequences side by side; memory grows with them, no result changes.
            capacity: tokens of the longest prompt and completion together; None: the context.
            prefill: tokens of prompts read in one step (padding counted), so that a long prompt
                does not hold the others up: it is read piece by piece.
            draft: a smaller model of the same vocabulary that proposes tokens, which `model` then
                reads all at once and accepts or refuses such that its own distribution is drawn
                from exactly. For `draft` and `ahead` given, a sequence still depends on its key
                alone. Leviathan, Kalman and Matias 2023, algorithm 1.
            ahead: how many tokens the draft proposes at a time.

        Raises:
            ConfigError: a number below 1.
        """
        for name, value in (("slots", slots), ("prefill", prefill), ("ahead", ahead)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._models = [model] if draft is None else [model, draft]
        self._ahead = 0 if draft is None else ahead
        self._slots, self._prefill = slots, prefill
        self._context = min(each.context for each in self._models)
        if capacity is not None:
            self._context = min(self._context, capacity)
        if self._context < 2:
            raise ConfigError(f"a capacity of {self._context} leaves no room for a new token")
        self._queue: deque[_Reading] = deque()
        self._caches: list[Cache] = []
        self._active: list[Writing] = []
        """By slot; the used slots are always the first ones."""
        self._vocabulary = 0
        """Of the model, once it has predicted."""

    @property
    def idle(self) -> bool:
        """Nothing is being written, and nothing waits."""
        return not self._queue and all(writing.finished for writing in self._active)

    def add(
        self, prompt: Tensor, settings: Settings, key: Key, *, index: int = 0, samples: int = 1
    ) -> tuple[Writing, ...]:
        """Line up `samples` completions of a prompt.

        Args:
            prompt: T int64, at least one token.
            settings: how to write them.
            key: the draw of a token depends on (key, index, sample, its place) alone.
            index: the prompt's, in the key.
            samples: G.

        Returns:
            The samples, to be looked at after every step.

        Raises:
            ConfigError: `samples` below 1.
            DataError: an empty prompt, or one that leaves no room in the context.
        """
        if samples < 1:
            raise ConfigError(f"samples must be at least 1, got {samples}")
        writings = tuple(
            begin(prompt, settings, key, index, sample, self._context) for sample in range(samples)
        )
        self._queue.append(_Reading(prompt=prompt, waiting=deque(writings)))
        return writings

    def cancel(self, writing: Writing) -> None:
        """End a completion where it is; what it has is kept, its slot is free at the next step."""
        if writing.finished:
            return
        writing.cancelled = True
        for reading in self._queue:
            if writing in reading.waiting:
                reading.waiting.remove(writing)
                if not reading.waiting:
                    self._queue.remove(reading)
                return

    @torch.inference_mode()
    def step(self) -> list[Writing]:
        """Read prompts into free slots, then draw once in every slot.

        Returns:
            The sequences that were worked on, in no particular order; those whose logits are
            broken say so as their `failure`, and leave the others alone.

        Raises:
            Exception: what a condition (`Settings.ends`) raised; its sequence ends with it as its
                `failure`, the others have their tokens and go on with the next step.
            DataError: a prompt holds a token that the model does not know; it leaves the queue.
        """
        with _all_evaluating(self._models):
            self._leave()
            touched = self._admit()
            self._leave()
            if self._active:
                touched = list(dict.fromkeys([*touched, *self._active]))
                if self._ahead:
                    self._speculate()
                else:
                    self._advance()
        for writing in touched:
            if writing.failure is not None and not isinstance(writing.failure, NonFinite):
                raise writing.failure
        return touched

    # --- reading prompts ---

    def _admit(self) -> list[Writing]:
        """Fill free slots from the queue; those that entered, their first token drawn."""
        entered: list[Writing] = []
        free = self._slots - len(self._active)
        # Prompts are read a few at a time: alone, one costs nearly what several cost together.
        if not free or (self._active and free < self._slots // 8 and self._wait_for_more(free)):
            return entered
        self._read(free)
        while self._queue and self._queue[0].logits is not None:
            reading = self._queue[0]
            count = min(self._slots - len(self._active), len(reading.waiting))
            if count:
                entered += self._enter(reading, count)
            if reading.waiting:
                break
            self._queue.popleft()
        return entered

    def _wait_for_more(self, free: int) -> bool:
        """Whether more sequences wait than there are free slots."""
        waiting = 0
        for reading in self._queue:
            waiting += len(reading.waiting)
            if waiting > free:
                return True
        return False

    def _read(self, free: int) -> None:
        """Read, within the budget, prompts whose samples may find one of `free` slots."""
        chosen: list[_Reading] = []
        longest = slots = 0
        for reading in self._queue:
            if slots >= free:
                break
            slots += len(reading.waiting)
            if reading.logits is not None:
                continue
            longest = max(longest, len(reading.prompt))
            if chosen and (len(chosen) + 1) * longest > self._prefill:
                break
            chosen.append(reading)
            if reading.done or len(reading.prompt) > self._prefill:
                break  # a long one is read alone, and the next ones after it
        if not chosen:
            return
        first = chosen[0]
        if not first.caches:
            longest = max(len(reading.prompt) for reading in chosen)
            caches = [model.new_cache(len(chosen), longest, self._ahead) for model in self._models]
            for row, reading in enumerate(chosen):
                reading.caches, reading.row = caches, row
        pieces = [r.prompt[r.done : r.done + self._prefill].cpu() for r in chosen]
        batch = _columns(pieces, chosen[0].done, self._ahead + 2)
        ends = torch.tensor([len(piece) - 1 for piece in pieces])
        ends += torch.arange(len(pieces)) * batch.shape[1]
        whole = chosen[-1].done + len(pieces[-1]) == len(chosen[-1].prompt)
        try:
            for which, (model, cache) in enumerate(zip(self._models, first.caches, strict=True)):
                device = device_of(model, first.prompt)
                try:
                    prediction = model(batch.to(device), cache)
                except IndexError as error:  # of the embedding
                    self._refuse(chosen, error)
                if whole and which == 0:
                    logits = prediction.logits(ends.to(device))
                    self._vocabulary = logits.shape[-1]
                    for row, reading in enumerate(chosen):
                        reading.logits = logits[row : row + 1]
        except BaseException:
            for reading in chosen:  # half read: the next step begins them again
                reading.caches, reading.row, reading.done, reading.logits = [], 0, 0, None
            raise
        for reading, piece in zip(chosen, pieces, strict=True):
            reading.done += len(piece)

    def _refuse(self, chosen: Sequence[_Reading], error: IndexError) -> NoReturn:
        """Take the prompt with the highest token out of the queue."""
        worst = max(chosen, key=lambda reading: int(reading.prompt.max()))
        self._queue.remove(worst)
        refused = DataError(
            f"the prompt of {worst.waiting[0].name} holds the token {int(worst.prompt.max())}, "
            f"which the model (or its draft) does not know: {error}; use the model's own tokenizer"
        )
        for writing in worst.waiting:
            writing.failure = refused
        raise refused from error

    def _enter(self, reading: _Reading, count: int) -> list[Writing]:
        """Give `count` samples of a prompt that was read a slot each; draw their first token."""
        entering = [reading.waiting.popleft() for _ in range(count)]
        if not self._caches:
            self._caches = self._empty_caches()
        rows = _indices(range(len(self._active), len(self._active) + count))
        for cache, source in zip(self._caches, reading.caches, strict=True):
            cache.put(rows, source, _indices([reading.row] * count))
        self._active += entering
        assert reading.logits is not None
        draw_each(reading.logits.expand(count, -1), entering)
        return entering

    def _empty_caches(self) -> list[Cache]:
        capacity = self._context - 1  # the last token drawn is never read
        return [
            model.new_cache(self._slots, capacity, self._ahead).select(_indices([]))
            for model in self._models
        ]

    # --- drawing ---

    def _advance(self) -> None:
        """One token in every used slot."""
        (model,), (cache,) = self._models, self._caches
        device = device_of(model, self._active[0].prompt)
        tokens = torch.tensor([[w.tokens[-1]] for w in self._active], device=device)
        positions = torch.tensor([[w.position] for w in self._active], device=device)
        logits = model(_plain(tokens, positions), cache).logits(slice(None))
        draw_each(logits, self._active)

    def _speculate(self) -> None:
        """As many tokens as the draft guesses, and one more, in every used slot."""
        (model, draft), (cache, draft_cache) = self._models, self._caches
        proposals = propose(draft, draft_cache, self._active, self._ahead)
        if self._vocabulary != proposals.drafted.shape[-1]:
            raise DataError(
                f"the draft model has a vocabulary of {proposals.drafted.shape[-1]} tokens, the "
                f"model one of {self._vocabulary}; a draft needs the model's own tokenizer"
            )
        logits = model(proposals.batch, cache).logits(slice(None))
        logits = logits.unflatten(0, proposals.batch.shape)
        least = [writing.position + 1 for writing in self._active]
        judge(proposals, logits, self._active)
        # All but the newest token; what failed may have got none, and leaves.
        lengths = [max(w.position, n) for w, n in zip(self._active, least, strict=True)]
        cache.rewind(lengths)
        for writing, length in zip(self._active, lengths, strict=True):
            writing.drafted = min(writing.drafted, length)
        draft_cache.rewind([writing.drafted for writing in self._active])

    # --- leaving ---

    def _leave(self) -> None:
        """Give the slots of finished sequences free, and move the last ones into the gaps."""
        kept = [row for row, writing in enumerate(self._active) if not writing.finished]
        if len(kept) == len(self._active):
            return
        movers = [row for row in kept if row >= len(kept)]
        rows = [
            movers.pop() if self._active[place].finished else place for place in range(len(kept))
        ]
        broken = any(isinstance(writing.failure, NonFinite) for writing in self._active)
        self._active = [self._active[row] for row in rows]
        if not broken:
            self._caches = [cache.select(_indices(rows)) for cache in self._caches]
            return
        # What is not seen has weight 0, but 0 times NaN is NaN: broken memory is not used again.
        old, self._caches = self._caches, self._empty_caches()
        for cache, source in zip(self._caches, old, strict=True):
            if rows:
                cache.put(_indices(range(len(rows))), source, _indices(rows))


def _plain(tokens: Tensor, positions: Tensor) -> TokenBatch:
    """Columns of new tokens; nothing is a target."""
    zeros = torch.zeros_like(tokens)
    return TokenBatch(
        tokens=tokens, positions=positions, documents=zeros, targets=zeros, mask=zeros.bool()
    )


def _columns(pieces: Sequence[Tensor], start: int, least: int) -> TokenBatch:
    """Pieces of prompts that begin at position `start`, padded on the right.

    Args:
        pieces: at least one token each.
        start: the same for all.
        least: columns to have; a model lays out its weights anew for fewer, which one reading of
            a prompt is not worth.
    """
    batch = TokenBatch.of([*pieces, torch.zeros(least, dtype=torch.int64)]).rows(0, len(pieces))
    return replace(batch, positions=torch.where(batch.documents >= 0, batch.positions + start, 0))


def _indices(rows: Sequence[int]) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64)


@contextmanager
def _all_evaluating(models: Sequence[Backbone]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        yield
