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

import numpy as np
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key, Sampler
from cabochon.core.errors import ConfigError, MissingExtra, NonFinite
from cabochon.generation.engine import Settings
from cabochon.generation.limits import new_tokens, refuse_unknown
from cabochon.generation.modes import evaluating
from cabochon.generation.sample import Draws, broken_rows, draw
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
    settings: Settings,
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
        ConfigError: `samples` or `rows` below 1, or a setting that only the engine knows.
        DataError: an empty prompt, or one that leaves no room in the model's context.
        MissingExtra: transformers is not installed.
        NonFinite: logits from which nothing can be drawn; names prompt, sample and token.
    """
    refuse_unknown(settings, "transformers' generate")
    if samples < 1 or rows < 1:
        raise ConfigError(f"samples and rows must be at least 1, got {samples} and {rows}")
    if indices is None:
        indices = range(len(prompts))
    if len(indices) != len(prompts):
        raise ConfigError(f"got {len(indices)} indices for {len(prompts)} prompts")
    room = [
        new_tokens(model.context, prompt, index, settings)
        for prompt, index in zip(prompts, indices, strict=True)
    ]
    waiting = [(place, sample) for place in range(len(prompts)) for sample in range(samples)]
    waiting.sort(key=lambda each: len(prompts[each[0]]))
    written: dict[tuple[int, int], Completion] = {}
    for _, alike in groupby(waiting, key=lambda each: len(prompts[each[0]])):
        equals = list(alike)
        for start in range(0, len(equals), rows):
            chunk = equals[start : start + rows]
            draws = _Draws(
                names=[f"prompt {indices[p]}, sample {s}" for p, s in chunk],
                uniforms=np.stack(
                    [key.fold(indices[p], s).numpy().random(room[p]) for p, s in chunk], axis=1
                ),
                settings=settings,
            )
            _run(model, torch.stack([prompts[p] for p, _ in chunk]), draws)
            for row, (place, sample) in enumerate(chunk):
                written[place, sample] = draws.completion(row, prompts[place].device)
    return [
        Group(prompt=prompt, completions=tuple(written[place, s] for s in range(samples)))
        for place, prompt in enumerate(prompts)
    ]


class _Draws:
    """A logits processor and stopping criterion in one: draws every token, and keeps the draws."""

    def __init__(
        self, names: Sequence[str], uniforms: np.ndarray[Any, Any], settings: Settings
    ) -> None:
        self.names = names
        self.uniforms = torch.from_numpy(uniforms)
        """Steps rows."""
        self.settings = settings
        self.steps: list[Draws] = []
        self.finished = torch.zeros(len(names), dtype=torch.bool)

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits of one step (n V), or what is left of them: the drawn token alone."""
        if bool(self.finished.all()):
            return scores  # transformers may look one step ahead; its token is thrown away
        try:
            drawn = draw(
                scores,
                self.uniforms[len(self.steps)].to(scores.device),
                temperature=self.settings.temperature,
                top_k=self.settings.top_k,
                top_p=self.settings.top_p,
            )
        except NonFinite as error:
            broken = [f"{self.names[row]}, token {len(self.steps)}" for row in broken_rows(scores)]
            raise NonFinite(
                f"the model's logits are NaN, +inf or all -inf for {'; '.join(broken)}; "
                "look for NaN in its weights, or decode in float32"
            ) from error
        self.steps.append(
            Draws(
                tokens=drawn.tokens.cpu(),
                logprob=drawn.logprob.cpu(),
                model_logprob=drawn.model_logprob.cpu(),
            )
        )
        stops = torch.tensor(self.settings.stop_ids, dtype=torch.int64)
        self.finished |= torch.isin(self.steps[-1].tokens, stops)
        self.finished |= len(self.steps) == len(self.uniforms)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn.tokens.unsqueeze(1), 0.0)

    def stop(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """n bool: the row needs no further token."""
        return self.finished.to(input_ids.device)

    def completion(self, row: int, device: torch.device) -> Completion:
        tokens = torch.stack([step.tokens[row] for step in self.steps])
        stops = torch.tensor(self.settings.stop_ids, dtype=torch.int64)
        ends = torch.isin(tokens, stops).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(tokens)
        logprob = torch.stack([step.logprob[row] for step in self.steps])
        model_logprob = torch.stack([step.model_logprob[row] for step in self.steps])
        return Completion(
            tokens=tokens[:length].to(device),
            logprob=logprob[:length].to(device),
            model_logprob=model_logprob[:length].to(device),
            stopped=bool(ends),
        )


def _run(model: ForeignModel, prompts: Tensor, draws: _Draws) -> None:
    transformers = _transformers()
    inner = model.inner
    prompts = prompts.to(inner.device)
    with torch.no_grad(), evaluating(model), _own_defaults(inner, transformers.GenerationConfig()):
        inner.generate(
            inputs=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=transformers.GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=len(draws.uniforms)
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
