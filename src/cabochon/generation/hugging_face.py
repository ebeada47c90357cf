"""Drawing through transformers' own `generate`: for any causal language model it has.

Our engine runs these models too (`models/foreign.py`), wherever a cache can be masked exactly; this
backend asks nothing of the architecture, so it also serves recurrent ones, and it is an oracle.

transformers draws with the global generator of torch, one number for all rows together; there a
draw depends on its neighbours. Here a logits processor draws instead, by our inverse CDF from the
sequence's own uniform numbers, and leaves transformers nothing but that token to choose. So the
tokens are those of the engine with the same key, and both log-probabilities come from the same
draw. Prompts of one length share a call and no row is ever padded; none of the sampling defaults
that a model's generation_config.json may hold is used.

What is not possible: reading a prompt once for all its samples (transformers reads it for each),
and a finished row leaving before the longest of its call has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Group, Key, Sampler
from cabochon.core.errors import ConfigError, MissingExtra
from cabochon.generation.drawing import draw_each
from cabochon.generation.limits import for_each
from cabochon.generation.modes import evaluating
from cabochon.generation.settings import Settings
from cabochon.generation.writing import Writing, begin, grouped
from cabochon.models.foreign import ForeignModel

__all__ = ["generate", "sampler"]


def sampler(model: ForeignModel, settings: Settings, samples: int, *, rows: int = 64) -> Sampler:
    """`generate` with everything but the prompts and the key decided."""

    def sample(prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
        return generate(model, prompts, settings, key, samples, rows=rows)

    return sample


def generate(
    model: ForeignModel,
    prompts: Sequence[Tensor],
    settings: Settings | Sequence[Settings],
    key: Key,
    samples: int = 1,
    *,
    indices: Sequence[int] | None = None,
    rows: int = 64,
) -> list[Group]:
    """`samples` completions of each prompt, in the prompts' order, by transformers' `generate`.

    Args and results are those of `engine.generate`, tokens included up to the rounding of the
    model's own products.

    Raises:
        ConfigError: `samples` or `rows` below 1, or not as many settings or indices as prompts.
        DataError: an empty prompt, or one that leaves no room in the model's context.
        MissingExtra: transformers is not installed.
        NonFinite: as the engine.
    """
    if samples < 1 or rows < 1:
        raise ConfigError(f"samples and rows must be at least 1, got {samples} and {rows}")
    each = for_each(len(prompts), settings, indices)
    writings = [
        [begin(prompt, how, key, index, sample, model.context) for sample in range(samples)]
        for prompt, (index, how) in zip(prompts, each, strict=True)
    ]
    waiting = sorted((w for group in writings for w in group), key=_length)
    for _, alike in groupby(waiting, key=_length):
        equals = list(alike)
        for start in range(0, len(equals), rows):
            _write(model, equals[start : start + rows])
    return grouped(prompts, writings)


def _length(writing: Writing) -> int:
    return len(writing.prompt)


class _Draws:
    """A logits processor and a stopping criterion in one: it draws every token, and keeps it."""

    def __init__(self, writings: Sequence[Writing]) -> None:
        self.writings = writings

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits of one step (n V), or what is left of them: the drawn tokens alone."""
        rows = [row for row, writing in enumerate(self.writings) if not writing.finished]
        draw_each(scores[rows], [self.writings[row] for row in rows])
        only = torch.full_like(scores, -torch.inf)
        only[:, 0] = 0.0  # whatever transformers takes for a row that is finished
        for row in rows:
            writing = self.writings[row]
            if writing.failure is None:
                only[row, 0], only[row, writing.tokens[-1]] = -torch.inf, 0.0
        return only

    def stop(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """n bool: the row needs no further token."""
        return torch.tensor([w.finished for w in self.writings], device=input_ids.device)


def _write(model: ForeignModel, writings: Sequence[Writing]) -> None:
    """Writings of prompts of one length to their ends."""
    transformers = _transformers()
    inner, draws = model.inner, _Draws(writings)
    prompts = torch.stack([writing.prompt for writing in writings]).to(inner.device)
    with torch.no_grad(), evaluating(model), _own_defaults(inner, transformers.GenerationConfig()):
        inner.generate(
            inputs=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=transformers.GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=max(w.limit for w in writings)
            ),
            logits_processor=transformers.LogitsProcessorList([draws]),
            stopping_criteria=transformers.StoppingCriteriaList([draws.stop]),
        )


@contextmanager
def _own_defaults(inner: Any, defaults: Any) -> Iterator[None]:
    """Without the model's generation_config, which would fill in whatever ours leaves open."""
    before = inner.generation_config
    inner.generation_config = defaults
    try:
        yield
    finally:
        inner.generation_config = before


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "drawing through transformers") from error
    return transformers
