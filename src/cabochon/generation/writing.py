"""One completion while it is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key
from cabochon.core.errors import DataError, NonFinite
from cabochon.generation.settings import Settings

__all__ = ["Token", "Writing", "begin", "grouped"]

Uniforms = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a stream, as it comes."""

    id: int
    logprob: float
    """Nats, under the distribution it was drawn from; greedy: as `model_logprob`."""
    model_logprob: float
    """Nats, under the model at temperature 1 with no cut."""


@dataclass(kw_only=True, eq=False)
class Writing:
    """A prompt, and what has been written after it so far."""

    prompt: Tensor
    settings: Settings
    key: Key
    """Its own: nothing else decides what is drawn."""
    name: str
    """For messages."""
    limit: int
    """The most tokens it gets: `max_new_tokens`, or as many as the context has room for."""
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    model_logprob: list[float] = field(default_factory=list)
    stopped: bool = False
    """A stop token or condition ended it."""
    cancelled: bool = False
    failure: Exception | None = None
    """What kept it from being finished: broken logits, a prompt that the model cannot read, or
    what a condition raised."""

    drafted: int = field(default=0, init=False)
    """Tokens of prompt and completion that a draft model has read."""

    def __post_init__(self) -> None:
        self.drafted = len(self.prompt)
        self._streams: dict[str, Uniforms] = {}

    def stream(self, purpose: str = "") -> Uniforms:
        """Uniform numbers, one for each token there is room for.

        The n-th of the nameless stream draws the n-th token; what else needs chance has a stream
        of its own. They are made when they are first asked for.
        """
        if purpose not in self._streams:
            key = self.key.fold(purpose) if purpose else self.key
            self._streams[purpose] = key.numpy().random(self.limit)
        return self._streams[purpose]

    @property
    def finished(self) -> bool:
        """Nothing more will be written."""
        return (
            self.stopped
            or self.cancelled
            or self.failure is not None
            or len(self.tokens) == self.limit
        )

    @property
    def position(self) -> int:
        """Where the newest token stands, the prompt's tokens counted."""
        return len(self.prompt) + len(self.tokens) - 1

    def write(self, token: int, logprob: float, model_logprob: float) -> None:
        """Append a token, and see whether it is the last.

        What a condition raises becomes the `failure`: the neighbours' tokens are still to come.
        """
        self.tokens.append(token)
        self.logprob.append(logprob)
        self.model_logprob.append(model_logprob)
        settings = self.settings
        try:
            self.stopped = token in settings.stop_ids or any(
                ends(self.tokens) for ends in settings.ends
            )
        except Exception as error:  # the caller's own function may raise anything
            error.add_note(f"raised by a stop condition of {self.name}, token {len(self.tokens)}")
            self.failure = error
        if self.finished:
            self._streams.clear()

    def newest(self, count: int) -> list[Token]:
        """The last `count` tokens."""
        places = range(len(self.tokens) - count, len(self.tokens))
        return [
            Token(id=self.tokens[p], logprob=self.logprob[p], model_logprob=self.model_logprob[p])
            for p in places
        ]

    def completion(self) -> Completion:
        """What was written, on the prompt's device; outside inference mode, one to train on."""
        device = self.prompt.device
        return Completion(
            tokens=torch.tensor(self.tokens, dtype=torch.int64, device=device),
            logprob=torch.tensor(self.logprob, dtype=torch.float32, device=device),
            model_logprob=torch.tensor(self.model_logprob, dtype=torch.float32, device=device),
            stopped=self.stopped,
        )


def begin(
    prompt: Tensor, settings: Settings, key: Key, index: int, sample: int, context: int
) -> Writing:
    """A completion of which nothing is written yet.

    Args:
        prompt: T int64.
        settings: how to write it.
        key: of the whole call; the completion's own is folded from it, `index` and `sample`.
        index: which prompt.
        sample: which of its samples.
        context: tokens that prompt and completion may have together.

    Raises:
        DataError: the prompt is empty, no tokens, or leaves no room.
    """
    if prompt.ndim != 1 or len(prompt) == 0:
        raise DataError(
            f"prompt {index} has shape {tuple(prompt.shape)}; a prompt is one row of at least one "
            "token (begin with BOS where there is no text)"
        )
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype is torch.bool:
        raise DataError(f"prompt {index} is of {prompt.dtype}; a prompt is int64 token ids")
    if prompt.device.type == "cpu" and int(prompt.min()) < 0:
        raise DataError(f"prompt {index} holds the token {int(prompt.min())}; ids begin at 0")
    room = context - len(prompt)
    if room < 1:
        raise DataError(
            f"prompt {index} has {len(prompt)} tokens, the model's context is {context} "
            "(or its draft's, or the capacity asked for); shorten it so that at least one new "
            "token fits"
        )
    return Writing(
        prompt=prompt,
        settings=settings,
        key=key.fold(index, sample),
        name=f"prompt {index}, sample {sample}",
        limit=min(room, settings.max_new_tokens),
    )


def grouped(prompts: Sequence[Tensor], written: Sequence[Sequence[Writing]]) -> list[Group]:
    """What was written for each prompt.

    Raises:
        NonFinite: some sequences were broken; all groups are its `finished`.
        Exception: what a condition raised.
    """
    for writing in (writing for writings in written for writing in writings):
        if writing.failure is not None and not isinstance(writing.failure, NonFinite):
            raise writing.failure
    groups = [
        Group(prompt=prompt, completions=tuple(writing.completion() for writing in writings))
        for prompt, writings in zip(prompts, written, strict=True)
    ]
    failures = [str(w.failure) for writings in written for w in writings if w.failure]
    if failures:
        error = NonFinite("; ".join(failures))
        error.finished = groups
        raise error
    return groups
