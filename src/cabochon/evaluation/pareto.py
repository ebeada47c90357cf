"""Fronts of reward against distance: what a policy gained, and how far it went for it.

A method that moves a policy trades reward for divergence from where it began, so one number
compares nothing: a later checkpoint has more of both. Compared are fronts, at equal divergence, and
only where both were measured.

Source: Rame et al. 2024 (WARP), arXiv:2406.16768, section 4 (reward-KL fronts); Zitzler and Thiele
1999, "Multiobjective evolutionary algorithms: a comparative case study" (hypervolume).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cabochon.core.errors import ConfigError, DataError

__all__ = ["Point", "dominated", "hypervolume", "mean_reward", "undominated", "value_at_kl"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy by what it costs and what it is worth."""

    kl: float
    """KL(policy || where it began), nats of a whole sequence; less is better."""
    reward: float
    """Mean over prompts and samples, in the reward's own unit; more is better."""
    label: str = ""
    """Of which policy, for pictures and messages."""

    def __post_init__(self) -> None:
        # An estimate of a small divergence may be below 0; hiding that would bias a mean.
        if not (math.isfinite(self.kl) and math.isfinite(self.reward)):
            raise DataError(
                f"a point needs a finite KL and reward, got {self.kl} and {self.reward}"
                + (f" of {self.label}" if self.label else "")
            )


def dominated(points: Sequence[Point]) -> list[bool]:
    """For each point, whether another is at least as good in both and better in one.

    Points that are equal do not dominate each other.
    """
    return [
        any(
            other.kl <= one.kl
            and other.reward >= one.reward
            and (other.kl, other.reward) != (one.kl, one.reward)
            for other in points
        )
        for one in points
    ]


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that none dominates, by rising KL (and so by rising reward)."""
    kept = [point for point, worse in zip(points, dominated(points), strict=True) if not worse]
    return sorted(kept, key=lambda point: (point.kl, point.reward))


def value_at_kl(points: Sequence[Point], kl: float) -> float:
    """The reward that a front has at a divergence: straight lines between neighbouring points.

    The points are taken as a curve, in the order of their KL; of several at one KL the best counts.

    Args:
        points: of one method, at least one: checkpoints of a run, or steps of an interpolation.
        kl: where, in nats.

    Raises:
        ConfigError: `kl` lies outside of what was measured; a front says nothing beyond its ends.
        DataError: there are no points.
    """
    if not points:
        raise DataError("a front needs at least one point, got none")
    best: dict[float, float] = {}
    for point in points:
        best[point.kl] = max(point.reward, best.get(point.kl, -math.inf))
    curve = sorted(best.items())
    (lowest, _), (highest, _) = curve[0], curve[-1]
    if not lowest <= kl <= highest:
        raise ConfigError(
            f"the front was measured from KL {lowest:g} to {highest:g} and says nothing about "
            f"{kl:g}; ask within, or measure policies on the other side of it"
        )
    left = max(each for each in curve if each[0] <= kl)
    right = min(each for each in curve if each[0] >= kl)
    if left[0] == right[0]:
        return left[1]
    share = (kl - left[0]) / (right[0] - left[0])
    return (1.0 - share) * left[1] + share * right[1]


def hypervolume(points: Sequence[Point], *, kl: float, reward: float) -> float:
    """The area between the points and a reference: all (KL, reward) that a point is as good as.

    A union of rectangles, one from each point to the reference: no line is drawn between points, so
    a front that was measured more densely may have a little more. A point beyond the reference in
    either sense encloses nothing. The result depends on the reference, which fronts that are
    compared must share.

    Args:
        points: any number; none encloses 0.
        kl: of the reference, the most that is considered.
        reward: of the reference, the least that is considered; the start's own is a natural choice.

    Returns:
        Reward times nats.
    """
    total, height = 0.0, reward
    for point in undominated(points):  # rising in both: each adds the stripe above those before
        if point.kl < kl and point.reward > height:
            total += (kl - point.kl) * (point.reward - height)
            height = point.reward
    return total


def mean_reward(points: Sequence[Point], *, low: float, high: float) -> float:
    """The mean reward of a front between two divergences: the integral of `value_at_kl` over KL.

    Args:
        points: as `value_at_kl`.
        low: where the stretch begins, in nats.
        high: where it ends, above `low`.

    Raises:
        ConfigError: the stretch is none, or was not measured in full.
    """
    if not low < high:
        raise ConfigError(f"a stretch of KL needs low below high, got {low:g} and {high:g}")
    corners = sorted({low, high, *(point.kl for point in points if low < point.kl < high)})
    values = [value_at_kl(points, corner) for corner in corners]
    stripes = zip(corners, corners[1:], values, values[1:], strict=False)
    return math.fsum((b - a) * (x + y) / 2.0 for a, b, x, y in stripes) / (high - low)
