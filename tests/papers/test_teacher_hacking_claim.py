"""Tiapkin et al. 2025: offline distillation turns against the truth; fresh or more data does not.

What the claim does not say: in so small a world the offline proxy rises as well (ordinary
overfitting); a proxy that keeps falling while golden rises needs larger models.
"""

from __future__ import annotations

import pytest
from window_models import REGIMES, Curves, experiment

from cabochon.evaluation.distances import Change, change
from cabochon.evaluation.hacking import Detector, detect, judge

pytestmark = pytest.mark.claim

SEED = 0
WATCH = Detector(warmup=16, fitted=8)


def late(curve: Curves) -> Change:
    """How golden moved since the last measurement in the first half of the updates."""
    middle = max(at for at, step in enumerate(curve.steps) if 2 * step <= curve.steps[-1])
    return change(curve.golden[middle], curve.golden[-1])


def test_offline_data_turns_against_the_truth_and_fresh_or_more_data_does_not() -> None:
    outcome = experiment(SEED)
    curves = outcome.curves
    offline = judge(curves["offline"].steps, curves["offline"].proxy, curves["offline"].golden)

    # Offline golden falls, has its minimum within, and surely rises after it.
    assert offline.interior
    assert offline.golden.risen
    assert change(outcome.start, curves["offline"].golden[-1]).fallen

    # Every online or more diverse run ends lower, and is still falling.
    end = {name: curve.golden[-1] for name, curve in curves.items()}
    for name in REGIMES[1:]:
        assert change(end["offline"], end[name]).fallen
        assert late(curves[name]).mean < 0.0

    # At equally many sequences, prompts are worth more than further responses.
    assert change(end["diverse"], end["more_prompts"]).fallen

    # The proxy alone shows it: it turns offline, and nowhere else.
    turned = {}
    for name, curve in curves.items():
        points = [(s, p.mean) for s, p in zip(curve.steps, curve.proxy, strict=True)]
        turned[name] = detect(points, WATCH).turned
    assert turned["offline"] is not None
    assert set(turned.values()) == {turned["offline"], None}
