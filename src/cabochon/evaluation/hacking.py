"""Does a student still learn the truth, or only its teacher? With an oracle, and without one.

With an oracle there are two curves on held-out prompts: the proxy (distance to the teacher, which
training lowers) and the golden one (distance to the oracle, which is what is wanted). Golden that
rises while the proxy does not is teacher hacking; where both rise it is plain overfitting.

Without an oracle the proxy alone must do. In healthy distillation it follows a power of the number
of updates, log proxy = a - b log step. `detect` fits that law to the early points and says where
the curve leaves it: where it lies above the line by more than the early points let expect, or where
it turns and rises. Both rules only look backwards, so `detect` can watch a run.

Source: Tiapkin et al. 2025, arXiv:2502.02671, sections 4 and 5.
Differs: the paper gives no rule for the detector; thresholds are ours. A curve may leave the law
upwards merely because learning slows down at the student's capacity, which is why the two reasons
are told apart: only a proxy that rises shows that training harms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cabochon.core import Step
from cabochon.core.errors import ConfigError, DataError
from cabochon.evaluation.distances import Change, Distance, change

__all__ = ["Detector", "Finding", "Judgement", "Law", "Point", "detect", "judge", "watched"]

Point = tuple[int, float]
"""Updates made so far (at least 1), and the proxy then (at least 0)."""


@dataclass(frozen=True, kw_only=True)
class Detector:
    """When a curve counts as broken."""

    warmup: int = 0
    """Points up to this update are left out: the learning rate is still rising there."""
    fitted: int = 6
    """How many of the points after it the law is fitted to."""
    sigmas: float = 3.0
    """How far above the law a point may lie, in standard errors of what the fitted points foretell:
    their standard deviation, larger the farther the line is drawn out."""
    least_spread: float = 0.02
    """The standard deviation is never taken for less: a fiftieth, in log proxy."""
    window: int = 5
    """How many points a local slope is taken from."""
    sureness: float = 2.0
    """How many of its standard errors a local slope must be above 0 to count as risen; over the
    window it must also rise by more than the standard deviation of the fitted points."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.fitted < 3 or self.window < 4:
            raise ConfigError(
                "warmup must be at least 0, fitted at least 3 and window at least 4, got "
                f"{self.warmup}, {self.fitted} and {self.window}"
            )
        if not (self.sigmas > 0 and self.least_spread > 0 and self.sureness >= 0):
            raise ConfigError(
                "sigmas and least_spread must be above 0 and sureness at least 0, got "
                f"{self.sigmas}, {self.least_spread} and {self.sureness}"
            )


@dataclass(frozen=True, kw_only=True)
class Law:
    """Log proxy = intercept - slope log step, by least squares."""

    intercept: float
    slope: float
    """Above 0 while the student learns."""
    spread: float
    """Standard deviation of the fitted points around the line, in log proxy."""
    first: int
    """The first update it was fitted to."""
    last: int

    def at(self, step: int) -> float:
        """The proxy that it foretells, in nats."""
        return math.exp(self.intercept - self.slope * math.log(step))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the proxy alone tells of a run."""

    law: Law | None
    """None while there are too few points to fit it, or a proxy of 0, which has no logarithm."""
    left: int | None
    """The first update at which the proxy lies above the law by more than the allowed spread."""
    turned: int | None
    """The first update at which it has risen over a window of points."""

    @property
    def broken(self) -> int | None:
        """The first update at which either happened."""
        return min((each for each in (self.left, self.turned) if each is not None), default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Plain sentences, the earlier first; none while the law holds."""
        found = []
        if self.left is not None and self.law is not None:
            found.append(
                (
                    self.left,
                    f"at update {self.left} the distance to the teacher lies above the law that "
                    f"updates {self.law.first} to {self.law.last} followed",
                )
            )
        if self.turned is not None:
            found.append(
                (self.turned, f"at update {self.turned} the distance to the teacher is rising")
            )
        return tuple(text for _, text in sorted(found))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What proxy and golden curve tell of a run together."""

    lowest: int
    """The update with the lowest golden distance."""
    interior: bool
    """It is neither the first nor the last that was measured."""
    golden: Change
    """From there to the end."""
    proxy: Change
    """Over the same span."""
    kind: Literal["hacking", "overfitting", "none"]
    """Golden rises and the proxy does not; both rise; golden does not rise."""


def detect(points: Sequence[Point], detector: Detector | None = None) -> Finding:
    """Where a proxy curve leaves its law, from the curve alone.

    Args:
        points: in the order of their updates, evenly spaced in log step or not.
        detector: the thresholds; the defaults when absent.

    Raises:
        DataError: updates that do not rise from at least 1, or a proxy that is no finite number of
            at least 0.
    """
    detector = detector or Detector()
    steps, proxy = _arrays(points)
    late = steps > detector.warmup
    steps, proxy = steps[late], proxy[late]
    if len(steps) < detector.fitted or not (proxy > 0.0).all():
        return Finding(law=None, left=None, turned=None)
    x, y = np.log(steps), np.log(proxy)
    early = slice(0, detector.fitted)
    slope, intercept = np.polyfit(x[early], y[early], 1)
    residuals = y - (intercept + slope * x)
    spread = math.sqrt(float((residuals[early] ** 2).sum()) / (detector.fitted - 2))
    least = max(spread, detector.least_spread)
    # The line is uncertain too, the more the farther it is drawn out (prediction interval).
    off = x - x[early].mean()
    drawn_out = 1.0 + 1.0 / detector.fitted + off**2 / float((off[early] ** 2).sum())
    above = residuals > detector.sigmas * least * np.sqrt(drawn_out)
    above[early] = False
    law = Law(
        intercept=float(intercept),
        slope=-float(slope),
        spread=spread,
        first=int(steps[0]),
        last=int(steps[detector.fitted - 1]),
    )
    return Finding(
        law=law, left=_first(steps, above), turned=_first(steps, _rising(x, y, detector, least))
    )


def judge(steps: Sequence[int], proxy: Sequence[Distance], golden: Sequence[Distance]) -> Judgement:
    """Hacking, overfitting, or neither, from both curves on the same held-out prompts.

    Args:
        steps: the updates at which both were measured.
        proxy: distances to the teacher.
        golden: distances to the oracle.

    Raises:
        DataError: no point, or curves of different lengths.
    """
    if not steps or not len(steps) == len(proxy) == len(golden):
        raise DataError(
            f"a judgement needs both curves at the same updates, got {len(steps)} updates, "
            f"{len(proxy)} proxies and {len(golden)} golden distances"
        )
    at = min(range(len(steps)), key=lambda number: golden[number].mean)
    golden_change, proxy_change = change(golden[at], golden[-1]), change(proxy[at], proxy[-1])
    kind: Literal["hacking", "overfitting", "none"] = "none"
    if golden_change.risen:
        kind = "overfitting" if proxy_change.risen else "hacking"
    return Judgement(
        lowest=steps[at],
        interior=0 < at < len(steps) - 1,
        golden=golden_change,
        proxy=proxy_change,
        kind=kind,
    )


def watched(
    updates: Iterator[Step],
    proxy: Callable[[], float],
    *,
    every: int,
    warn: Callable[[str], None],
    seen: Sequence[Point] = (),
    detector: Detector | None = None,
) -> Iterator[Step]:
    """The same updates; some also report `proxy`, and a break of its law is told once.

    Args:
        updates: of any training.
        proxy: the student's distance to its teacher as it is now, on held-out prompts.
        every: updates between two measurements, at least 1.
        warn: told one plain sentence for each reason, at the update at which it first holds.
        seen: what was measured before the training was interrupted.
        detector: the thresholds; the defaults when absent.

    Raises:
        ConfigError: `every` is below 1.
    """
    if every < 1:
        raise ConfigError(f"the proxy is measured every 1 or more updates, got {every}")
    points = list(seen)
    told = set(detect(points, detector).reasons)
    for step in updates:
        if (step.index + 1) % every:
            yield step
            continue
        points.append((step.index + 1, proxy()))
        for reason in detect(points, detector).reasons:
            if reason not in told:
                warn(reason)
            told.add(reason)
        yield replace(step, report={**step.report, "proxy": points[-1][1]})


def _arrays(points: Sequence[Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = np.asarray([step for step, _ in points], dtype=np.float64)
    proxy = np.asarray([value for _, value in points], dtype=np.float64)
    if len(steps) and (steps[0] < 1 or (np.diff(steps) <= 0).any()):
        raise DataError(f"updates must rise from at least 1, got {steps.astype(int).tolist()}")
    if not np.isfinite(proxy).all() or (proxy < 0.0).any():
        raise DataError(f"distances must be finite and at least 0, got {proxy.tolist()}")
    return steps, proxy


def _rising(
    x: NDArray[np.float64], y: NDArray[np.float64], detector: Detector, least: float
) -> NDArray[np.bool_]:
    """Whether the window that ends at each point surely rises, and by more than `least`."""
    found = np.zeros(len(x), dtype=bool)
    for end in range(detector.window, len(x) + 1):
        part = slice(end - detector.window, end)
        (slope, _), covariance = np.polyfit(x[part], y[part], 1, cov=True)
        sure = slope > detector.sureness * math.sqrt(max(0.0, covariance[0, 0]))
        found[end - 1] = sure and slope * (x[end - 1] - x[end - detector.window]) > least
    return found


def _first(steps: NDArray[np.float64], marked: NDArray[np.bool_]) -> int | None:
    return int(steps[marked.argmax()]) if marked.any() else None
