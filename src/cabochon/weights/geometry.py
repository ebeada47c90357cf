"""Lengths and angles of task vectors, and the coefficients that a merge gives to each model.

The task vector of model m is delta_m = theta_m - theta_base, over a group of tensors. Everything
that a merge asks of it lies in the inner products <delta_i, delta_j>: a merged task vector is a sum
of c_m delta_m, and its length, its angle to another and the next merge's coefficients follow from
c and the products alone. So weights of any size are read once for the products and once for the
sum, and all angles are computed here, in float64, on matrices as small as the number of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, WeightsMismatch

__all__ = [
    "Mean",
    "Per",
    "TaskVectors",
    "convex",
    "ema_coefficients",
    "fraction",
    "group_of",
    "grouped",
    "slerp_coefficients",
    "together",
]

Array: TypeAlias = NDArray[np.float64]

Per = Literal["tensor", "block", "whole"]
"""What has one angle: each tensor; each transformer block, and each tensor outside of them; all."""

Mean = Literal["recursion", "symmetric"]
"""How more than two models combine: see `slerp_coefficients`."""

STRAIGHT = 1e-4
"""Where sin(angle) is less, an arc and its chord are the same in float32."""

_BLOCK = re.compile(r"^(?:[^.]+\.)+?\d+(?=\.)")


def group_of(name: str, per: Per) -> str:
    """The group that a tensor belongs to: what it shares its angle with.

    A block is everything below the first number in a name: `model.layers.3.mlp.up_proj.weight` and
    `model.layers.3.mlp.experts.0.weight` belong to `model.layers.3`. A tensor outside of all
    blocks (embedding, final norm, head) is a group of its own.
    """
    if per == "whole":
        return "all"
    block = _BLOCK.match(name) if per == "block" else None
    return name if block is None else block.group()


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """The task vectors of M models over one group of tensors."""

    products: Array
    """M M float64: <delta_i, delta_j>."""
    elements: int
    """How many numbers a task vector has here; a tensor that is stored twice counts once."""

    @property
    def norms(self) -> Array:
        """M: Euclidean lengths."""
        return np.sqrt(np.diagonal(self.products))

    @property
    def cosines(self) -> Array:
        """M M: of the angles between them; NaN where one of the two is zero."""
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = self.products / np.outer(self.norms, self.norms)
        return np.clip(cosines, -1.0, 1.0)


def together(parts: Iterable[TaskVectors]) -> TaskVectors:
    """The task vectors over all these groups: products add."""
    held = list(parts)
    return TaskVectors(
        products=np.sum([part.products for part in held], axis=0),
        elements=sum(part.elements for part in held),
    )


def convex(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of `count` models: equal ones if absent, never rescaled behind the caller's back.

    Raises:
        ConfigError: another number of weights, a negative one, one that is not a number, or a sum
            that is not 1 within 1e-6.
    """
    if weights is None:
        return [1.0 / count] * count
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ConfigError(f"{count} models need {count} weights, got {len(weights)} ({shown})")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(
            f"weights must be numbers of at least 0, got {shown}; a merge lies between its models, "
            "it does not extrapolate"
        )
    total = math.fsum(weights)
    if abs(total - 1.0) > 1e-6:
        scaled = ", ".join(f"{weight / total:.6g}" for weight in weights) if total else ""
        way = f"divided by that they are {scaled} (--normalize)" if total else "give one above 0"
        raise ConfigError(f"weights must sum to 1, got {shown}, which sum to {total:g}; {way}")
    return [weight / total for weight in weights]


def fraction(value: float, name: str) -> float:
    """`value`, once it is sure to lie in [0, 1].

    Raises:
        ConfigError: it does not.
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must lie in [0, 1], got {value}")
    return value


def ema_coefficients(count: int, decay: float) -> list[float]:
    """What n successive weights have in their moving average, which begins with the first.

    a_0 = w_0, a_i = d a_(i-1) + (1 - d) w_i: d^(n-1) for the first, (1 - d) d^(n-1-i) for each
    later one.

    Raises:
        ConfigError: `decay` is outside [0, 1].
    """
    fraction(decay, "decay")
    later = [(1.0 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    return [decay ** (count - 1), *later]


def slerp_coefficients(
    vectors: TaskVectors, weights: Sequence[float], mean: Mean, group: str
) -> list[float]:
    """Spherical interpolation of task vectors: c_m in delta = sum of c_m delta_m.

    For two models, with Om the angle between the task vectors and t the second one's weight,
    c = (sin((1 - t) Om), sin(t Om)) / sin Om. The ends are exact, and task vectors of equal length
    give one of that length. More models combine by

    - recursion: slerp(slerp(first m - 1), the m-th, t = w_m / (w_1 + ... + w_m)), which for equal
      weights is WARP's 1 / m. The order of the models matters: five orthogonal ones of equal
      weight get (.54, .54, .44, .36, .31).
    - symmetric: the weighted Frechet mean of the directions on the sphere, the one from which the
      arcs to all models, times their weights, cancel. Order does not matter, and two models give
      the same as by recursion.

    An arc needs two directions. Where a task vector is zero, where two are parallel, and where a
    group has one element, it is the straight line, whose coefficients are the weights.

    Args:
        vectors: of M models.
        weights: M, at least 0, of sum 1.
        mean: how more than two models combine.
        group: for messages.

    Raises:
        WeightsMismatch: directions are opposite, so that no arc between them is the shortest.

    Source: Rame et al. 2024 (WARP), arXiv:2406.16768, section 3.2; the symmetric mean is ours.
    """
    if vectors.elements == 1 or 1.0 in weights:
        return list(weights)
    if mean == "symmetric":
        centre: list[float] = _symmetric(vectors, np.asarray(weights), group).tolist()
        return centre
    found = np.zeros(len(weights))
    found[0], total = 1.0, weights[0]
    for m in range(1, len(weights)):
        total += weights[m]
        model = np.zeros(len(weights))
        model[m] = 1.0
        t = weights[m] / total if total else 0.0
        first, second = _arc(vectors.products, found, model, t, group)
        found = first * found + second * model
    coefficients: list[float] = found.tolist()
    return coefficients


def _arc(products: Array, a: Array, b: Array, t: float, group: str) -> tuple[float, float]:
    """What slerp takes of each of two combinations of task vectors."""
    lengths = _length(a, products) * _length(b, products)
    if t in (0.0, 1.0) or lengths == 0.0:
        return 1.0 - t, t
    cosine = float(np.clip(a @ products @ b / lengths, -1.0, 1.0))
    angle = math.acos(cosine)
    if math.sin(angle) < STRAIGHT:
        if cosine < 0:
            raise _opposite(group)
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _length(combination: Array, products: Array) -> float:
    return math.sqrt(max(float(combination @ products @ combination), 0.0))


def _symmetric(vectors: TaskVectors, weights: Array, group: str) -> Array:
    """The Frechet mean by its fixed point: walk the mean of the arcs until it is zero."""
    moved = vectors.norms > 0
    share = weights[moved].sum()
    result = np.zeros(len(weights))
    if share == 0.0:
        return weights
    weight, cosines = weights[moved] / share, vectors.cosines[np.ix_(moved, moved)]
    length = _length(weight, cosines)
    if length < STRAIGHT:
        raise _opposite(group)
    centre = weight / length
    for _ in range(200):
        towards = np.clip(cosines @ centre, -1.0, 1.0)
        angles = np.arccos(towards)
        sines = np.sin(angles)
        if np.any((sines < STRAIGHT) & (towards < 0)):
            raise _opposite(group)
        bent = sines >= STRAIGHT
        pull = weight * np.where(bent, angles / np.where(bent, sines, 1.0), 1.0)
        step = pull - (pull @ towards) * centre
        size = _length(step, cosines)
        if size < 1e-12:
            result[moved] = share * centre
            return result
        centre = math.cos(size) * centre + math.sin(size) / size * step
        centre /= _length(centre, cosines)
    raise _opposite(group)


def _opposite(group: str) -> WeightsMismatch:
    return WeightsMismatch(
        f"the task vectors of {group} point away from each other, so no arc between them is the "
        "shortest; take angles over more tensors at once (per block, or the whole model), or "
        "average, which goes straight"
    )


def grouped(parts: Mapping[str, TaskVectors], groups: Mapping[str, str]) -> dict[str, TaskVectors]:
    """The task vectors of every group, from those of its tensors."""
    held: dict[str, list[TaskVectors]] = {}
    for name, part in parts.items():
        held.setdefault(groups[name], []).append(part)
    return {group: together(each) for group, each in held.items()}
