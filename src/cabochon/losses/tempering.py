"""Distributions at another temperature, and the tokens of a text as if a teacher had drawn them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from cabochon.core import (
    GroupTargets,
    LinearPrediction,
    Prediction,
    SampledTargets,
    TokenBatch,
    TopKTargets,
)
from cabochon.core.errors import ConfigError

__all__ = ["tempered", "text_targets"]

T = TypeVar("T", bound=Prediction | TopKTargets | SampledTargets | GroupTargets)


@dataclass(frozen=True)
class _Tempered:
    """Any prediction with its logits divided."""

    inner: Prediction
    temperature: float

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.inner.logits(rows) / self.temperature


def tempered(target: T, temperature: float) -> T:
    """The same distributions with their logits divided by `temperature`, once more.

    Raises:
        ConfigError: the temperature is not above 0; or is not 1, where only the likeliest tokens,
            some draws or the text's own probability are known.
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"a temperature is finite and above 0, got {temperature}")
    if temperature == 1.0:
        return target
    if isinstance(target, TopKTargets | SampledTargets | GroupTargets):
        raise ConfigError(
            f"a teacher that does not say its whole distribution has none at temperature "
            f"{temperature}; leave its temperature at 1, or use the teacher's weights"
        )
    if isinstance(target, LinearPrediction):
        return cast(T, target.tempered(temperature))
    return cast(T, _Tempered(target, temperature))


def text_targets(batch: TokenBatch) -> SampledTargets:
    """The batch's own targets as a teacher's single draws: what is learned is the text."""
    ids = batch.targets.unsqueeze(-1)
    return SampledTargets(ids=ids, share=torch.ones_like(ids, dtype=torch.float32))
