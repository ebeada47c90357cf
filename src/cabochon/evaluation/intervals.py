"""How far a figure would move with other documents, or prompts, of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cabochon.core import Key

__all__ = ["Interval", "bootstrap", "mean_interval"]

Interval = tuple[float, float]
"""The lower and the upper end of a 95% interval."""

RESAMPLES = 1000


def bootstrap(
    sums: Sequence[float], counts: Sequence[int], key: Key | None = None
) -> Interval | None:
    """95% percentile interval of sum / count over resampled documents.

    Args:
        sums: n: what each document adds.
        counts: n: how many units each document has.
        key: names the resampling; ``Key(0, ("bootstrap",))`` when absent, so that figures of the
            same documents are resampled alike.

    Returns:
        The interval; None with a single document, which tells of no other.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    if len(sums) < 2:
        return None
    total, count = np.asarray(sums), np.asarray(counts)
    stream = (key or Key(0, ("bootstrap",))).numpy()
    means = []
    for _ in range(RESAMPLES):
        chosen = stream.integers(len(sums), size=len(sums))
        tokens = count[chosen].sum()
        if tokens:
            means.append(total[chosen].sum() / tokens)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float], key: Key | None = None) -> Interval | None:
    """95% percentile interval of the mean of `values`, in the way of `bootstrap`."""
    return bootstrap(values, [1] * len(values), key)
