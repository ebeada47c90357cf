"""From prompts to completions: read each prompt once, then draw token after token.

A sequence has its own stream of uniform numbers, named by the key, the prompt's index and the
sample's index; the n-th number draws the n-th token. So what is written depends neither on the
batch, nor on the order, nor on the neighbours (beyond the rounding of the model's own products).

    for group in generate(model, prompts, Settings(max_new_tokens=64, stop_ids=(1,)), Key(0)): ...
    for token in stream(model, prompt, Settings(temperature=0.7), Key(0)): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cabochon.core import (
    Backbone,
    Cache,
    Completion,
    Group,
    Key,
    Sampler,
    TokenBatch,
)
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.modes import evaluating
from cabochon.generation.sample import Draws, broken_rows, draw

__all__ = ["Settings", "Token", "generate", "sampler", "stream"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to write: which distribution to draw from, and when to end."""

    max_new_tokens: int = 128
    """The most tokens a completion may have; fewer fit where the context is nearly full."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token instead of drawing."""
    top_k: int = 0
    """How many of the most probable tokens may be drawn; 0: all."""
    top_p: float = 1.0
    """Mass of the nucleus that may be drawn; 1: all."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion (and are its last token)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0 keeps all tokens), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must lie in (0, 1] (1 keeps all tokens), got {self.top_p}")
        if any(stop < 0 for stop in self.stop_ids):
            raise ConfigError(f"stop_ids must be token ids, at least 0, got {self.stop_ids}")


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a stream, as it comes."""

    id: int
    logprob: float
    """Nats, under the distribution it was drawn from; greedy: as `model_logprob`."""
    model_logprob: float
    """Nats, under the model at temperature 1 with no cut."""


def generate(
    model: Backbone,
    prompts: Sequence[Tensor],
    settings: Settings,
    key: Key,
    samples: int = 1,
    *,
    indices: Sequence[int] | None = None,
    rows: int = 64,
) -> list[Group]:
    """`samples` completions of each prompt, in the prompts' order.

    The model is used as it is now, in evaluation mode and without gradients, and left as it was.

    Args:
        model: what predicts; its cache lives as long as the call.
        prompts: T int64 each, of at least one token; lengths may differ.
        settings: the same for all.
        key: the draw of a token depends on (key, prompt index, sample index, position) alone.
        samples: G, completions of each prompt.
        indices: the prompts' indices in the key; 0, 1, 2, ... when absent. Give them to write some
            of a larger list's completions: a rank's share, or a single one again.
        rows: how many sequences are written at a time (memory against speed; the results do not
            depend on it).

    Returns:
        One group for each prompt, its tensors on the prompt's device.

    Raises:
        ConfigError: `samples` or `rows` below 1.
        DataError: an empty prompt, or one that leaves no room in the model's context.
        NonFinite: logits from which nothing can be drawn; names prompt, sample and position.
    """
    if samples < 1 or rows < 1:
        raise ConfigError(f"samples and rows must be at least 1, got {samples} and {rows}")
    if indices is None:
        indices = range(len(prompts))
    if len(indices) != len(prompts):
        raise ConfigError(f"got {len(indices)} indices for {len(prompts)} prompts")
    sequences = [
        [_begin(model, prompt, settings, key, index, sample) for sample in range(samples)]
        for prompt, index in zip(prompts, indices, strict=True)
    ]
    # Neighbours of like length waste the least padding; the order changes no result.
    waiting = [s for group in sorted(sequences, key=lambda g: len(g[0].prompt)) for s in group]
    for start in range(0, len(waiting), rows):
        for _ in _decode(model, waiting[start : start + rows], settings):
            pass
    return [
        Group(prompt=prompt, completions=tuple(s.completion() for s in group))
        for prompt, group in zip(prompts, sequences, strict=True)
    ]


def stream(
    model: Backbone, prompt: Tensor, settings: Settings, key: Key, *, index: int = 0
) -> Iterator[Token]:
    """The tokens of one completion, each as soon as it is drawn.

    They are those of `generate` for a prompt of this `index` (its sample 0). Leaving the iterator
    early is how to cancel; between tokens the model is as it was, and may be used or changed.

    Raises:
        DataError: an empty prompt, or one that leaves no room in the model's context.
        NonFinite: logits from which nothing can be drawn; names the position.
    """
    sequence = _begin(model, prompt, settings, key, index, 0)
    for _ in _decode(model, [sequence], settings):
        yield sequence.last()


def sampler(model: Backbone, settings: Settings, samples: int) -> Sampler:
    """`generate` with everything but the prompts and the key decided."""

    def sample(prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
        return generate(model, prompts, settings, key, samples)

    return sample


@dataclass(kw_only=True)
class _Sequence:
    """A prompt and what has been written after it so far."""

    prompt: Tensor
    name: str
    uniforms: np.ndarray[tuple[int], np.dtype[np.float64]]
    """One number for each token there is room for."""
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    model_logprob: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.tokens) == len(self.uniforms)

    def last(self) -> Token:
        return Token(
            id=self.tokens[-1],
            logprob=self.logprob[-1],
            model_logprob=self.model_logprob[-1],
        )

    def completion(self) -> Completion:
        # Made here, outside inference mode, so that a trainer may differentiate through them.
        device = self.prompt.device
        return Completion(
            tokens=torch.tensor(self.tokens, dtype=torch.int64, device=device),
            logprob=torch.tensor(self.logprob, dtype=torch.float32, device=device),
            model_logprob=torch.tensor(self.model_logprob, dtype=torch.float32, device=device),
            stopped=self.stopped,
        )


def _begin(
    model: Backbone, prompt: Tensor, settings: Settings, key: Key, index: int, sample: int
) -> _Sequence:
    if prompt.ndim != 1 or len(prompt) == 0:
        raise DataError(
            f"prompt {index} has shape {tuple(prompt.shape)}; a prompt is one row of at least one "
            "token (begin with BOS where there is no text)"
        )
    room = model.context - len(prompt)
    if room < 1:
        raise DataError(
            f"prompt {index} has {len(prompt)} tokens, the model's context is {model.context}; "
            "shorten it so that at least one new token fits"
        )
    count = min(room, settings.max_new_tokens)
    return _Sequence(
        prompt=prompt,
        name=f"prompt {index}, sample {sample}",
        uniforms=key.fold(index, sample).numpy().random(count),
    )


@torch.inference_mode()
def _decode(model: Backbone, sequences: Sequence[_Sequence], settings: Settings) -> Iterator[None]:
    """Write all sequences to their ends, side by side; yields after each step."""
    active = list(sequences)
    steps = max(len(s.uniforms) for s in active)
    with evaluating(model):
        logits, cache = _prefill(model, active)
    device = logits.device
    positions = torch.tensor([len(s.prompt) for s in active], device=device)
    padded = [np.pad(s.uniforms, (0, steps - len(s.uniforms))) for s in active]
    uniforms = torch.from_numpy(np.stack(padded, axis=1)).to(device)  # steps rows
    for step in range(steps):
        drawn = _draw(logits, uniforms[step], settings, active)
        _write(active, drawn, settings.stop_ids)
        yield
        tokens = drawn.tokens
        survivors = _survivors(active)
        if not survivors:
            return
        if len(survivors) < len(active):
            active = [active[row] for row in survivors]
            chosen = torch.tensor(survivors, device=device)
            cache = cache.select(chosen)
            tokens, positions, uniforms = tokens[chosen], positions[chosen], uniforms[:, chosen]
        with evaluating(model):
            logits = model(_next(tokens, positions), cache).logits(slice(None))
        positions = positions + 1


def _prefill(model: Backbone, sequences: Sequence[_Sequence]) -> tuple[Tensor, Cache]:
    """Logits after each sequence's prompt (n V), and a cache with a row for each sequence.

    Neighbours with the same prompt share one reading of it.
    """
    prompts: list[Tensor] = []
    rows: list[int] = []
    for sequence in sequences:
        if not prompts or sequence.prompt is not prompts[-1]:
            prompts.append(sequence.prompt)
        rows.append(len(prompts) - 1)
    longest = max(len(s.prompt) + len(s.uniforms) for s in sequences)
    batch = TokenBatch.of([prompt.cpu() for prompt in prompts]).to(_device(model, prompts[0]))
    # The last token drawn is never read.
    cache = model.new_cache(len(prompts), longest - 1)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=batch.tokens.device)
    starts = torch.arange(len(prompts), device=ends.device) * batch.shape[1]
    logits = model(batch, cache).logits(starts + ends)
    if len(prompts) == len(rows):
        return logits, cache
    chosen = torch.tensor(rows, device=ends.device)
    return logits[chosen], cache.select(chosen)


def _next(tokens: Tensor, positions: Tensor) -> TokenBatch:
    """One new token a row; nothing is a target."""
    column = tokens.unsqueeze(1)
    zeros = torch.zeros_like(column)
    return TokenBatch(
        tokens=column,
        positions=positions.unsqueeze(1),
        documents=zeros,
        targets=zeros,
        mask=zeros.bool(),
    )


def _draw(
    logits: Tensor, uniforms: Tensor, settings: Settings, active: Sequence[_Sequence]
) -> Draws:
    try:
        return draw(
            logits,
            uniforms,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
    except NonFinite as error:
        names = [f"{active[r].name}, token {len(active[r].tokens)}" for r in broken_rows(logits)]
        raise NonFinite(
            f"the model's logits are NaN, +inf or all -inf for {'; '.join(names)}; "
            "look for NaN in its weights, or decode in float32"
        ) from error


def _write(active: Sequence[_Sequence], drawn: Draws, stop_ids: Sequence[int]) -> None:
    columns = (drawn.tokens.tolist(), drawn.logprob.tolist(), drawn.model_logprob.tolist())
    for sequence, token, logprob, model_logprob in zip(active, *columns, strict=True):
        sequence.tokens.append(token)
        sequence.logprob.append(logprob)
        sequence.model_logprob.append(model_logprob)
        sequence.stopped = token in stop_ids


def _survivors(active: Sequence[_Sequence]) -> list[int]:
    """The rows that go on; a gap is filled from the end, so that few rows of the cache move."""
    rows = [row for row, sequence in enumerate(active) if not sequence.finished]
    kept = len(rows)
    movers = [row for row in rows if row >= kept]
    return [movers.pop() if active[row].finished else row for row in range(kept)]


def _device(model: Backbone, prompt: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        return next(model.parameters()).device
    return prompt.device
