"""Rewards made of parts: a weighted sum, each part on a scale frozen on reference samples.

    reward = Composition(parts=(
        Part(name="parses", reward=judged(parses(), tokenizer.decode)),
        Part(name="length", reward=excess(80), weight=0.5),
    ))
    reward = frozen(reward, reference)  # each part: mean 0, standard deviation 1 there, for good

Scales that follow the policy would let a reward that everybody gets count as nothing, and the
goal move with whoever runs towards it; so they are measured once and written down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Group, RewardFn
from cabochon.core.errors import ConfigError, DataError
from cabochon.files import write_whole
from cabochon.rewards.scores import Scores, scores

__all__ = [
    "Composition",
    "Part",
    "Scale",
    "ensemble",
    "frozen",
    "load_scales",
    "rescaled",
    "save_scales",
]

FLAT = 1e-6
"""A part whose spread is below this share of its size is constant but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is subtracted from a part, and what the rest is divided by."""

    mean: float = 0.0
    std: float = 1.0
    """Above 0."""
    samples: int = 0
    """How many completions it was measured on; 0 where it was given."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0.0 < self.std < math.inf):
            raise ConfigError(f"a scale needs a finite mean and a std above 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One term of a reward."""

    name: str
    reward: RewardFn
    weight: float = 1.0
    """Of either sign."""
    scale: Scale = Scale()


@dataclass(frozen=True, kw_only=True)
class Composition:
    """sum of weight (reward - mean) / std over the parts: a reward that tells its parts."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"a reward needs at least one part, each with a name of its own; got {names}"
            )
        for part in self.parts:
            if not math.isfinite(part.weight):
                raise ConfigError(f"the weight of {part.name} must be finite, got {part.weight}")

    def __call__(self, groups: Sequence[Group], /) -> Tensor:
        """P G float32."""
        return self.scores(groups).total

    def scores(self, groups: Sequence[Group], /) -> Scores:
        """The sum, and each part as it was given, before scale and weight.

        Raises:
            DataError: a part raises an error or gives the wrong count; the part is named.
            NonFinite: a part is NaN or infinite somewhere; part, prompt and sample are named.
        """
        said = {part.name: scores(part.reward, groups, name=part.name).total for part in self.parts}
        total = torch.zeros_like(next(iter(said.values())), dtype=torch.float64)
        for part in self.parts:
            total += part.weight * (said[part.name].double() - part.scale.mean) / part.scale.std
        return Scores(total=total.float(), parts=said)


def ensemble(members: Mapping[str, RewardFn]) -> Composition:
    """The mean of several rewards, each of which becomes a part.

    Models of preferences say nothing of where 0 is: freeze the scales (`frozen`) before the
    rewards of different prompts are compared.
    """
    count = max(1, len(members))
    return Composition(
        parts=tuple(
            Part(name=name, reward=reward, weight=1.0 / count) for name, reward in members.items()
        )
    )


def frozen(reward: Composition, reference: Sequence[Group]) -> Composition:
    """The same reward, each of its parts on the scale that it has on `reference`.

    Args:
        reward: its present scales are replaced.
        reference: at least two completions in all, such as the policy's before any training.

    Raises:
        DataError: there are too few samples, or a part gives them all the same.
    """
    said = reward.scores(reference).parts
    parts = []
    for part in reward.parts:
        values = said[part.name].double().flatten()
        if len(values) < 2:
            raise DataError(f"a scale needs at least two samples, got {len(values)}")
        mean, std = values.mean().item(), values.std().item()
        if not std > FLAT * max(1.0, abs(mean)):
            raise DataError(
                f"{part.name} gives {mean:g} to all {len(values)} reference samples, so it has no "
                "scale; take other samples, or leave this part's scale as it is"
            )
        parts.append(replace(part, scale=Scale(mean=mean, std=std, samples=len(values))))
    return replace(reward, parts=tuple(parts))


def rescaled(reward: Composition, scales: Mapping[str, Scale]) -> Composition:
    """The same reward with these scales.

    Raises:
        DataError: they are not those of exactly its parts.
    """
    names = {part.name for part in reward.parts}
    if names != scales.keys():
        raise DataError(
            f"the reward has the parts {sorted(names)}, the scales are of {sorted(scales)}; "
            "measure them again for this reward"
        )
    parts = tuple(replace(part, scale=scales[part.name]) for part in reward.parts)
    return replace(reward, parts=parts)


def save_scales(reward: Composition, path: Path | str) -> None:
    """Write the scales of all parts as JSON."""
    content = {part.name: vars(part.scale) for part in reward.parts}
    write_whole(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_scales(path: Path | str) -> dict[str, Scale]:
    """The scales that `save_scales` wrote.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    try:
        content: Any = json.loads(Path(path).read_text("utf-8"))
        return {str(name): Scale(**each) for name, each in content.items()}
    except OSError as error:
        raise DataError(f"the scales of a reward cannot be read: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no scales of a reward ({error})") from error
