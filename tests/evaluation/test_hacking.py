"""The detector on curves whose breaks are known, and the judgement of both curves together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from cabochon.cli.proxy import MONITOR
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError, DataError
from cabochon.evaluation.distances import Distance
from cabochon.evaluation.hacking import Detector, Point, detect, judge, watched

STEPS = [round(10 * 1.3**n) for n in range(20)]


def law(step: int) -> float:
    return 5.0 * step**-0.4


def noisy(points: list[Point], size: float, seed: int = 0) -> list[Point]:
    noise = Key(seed).numpy().normal(0.0, size, len(points))
    return [
        (step, value * math.exp(each)) for (step, value), each in zip(points, noise, strict=True)
    ]


def test_a_curve_that_follows_the_law_is_not_flagged_and_the_law_is_found():
    found = detect([(step, law(step)) for step in STEPS])
    assert (found.left, found.turned, found.broken, found.reasons) == (None, None, None, ())
    assert found.law is not None
    assert found.law.slope == pytest.approx(0.4)
    assert math.exp(found.law.intercept) == pytest.approx(5.0)
    assert found.law.at(1000) == pytest.approx(law(1000))


@pytest.mark.parametrize("seed", range(20))
def test_two_percent_of_noise_does_not_flag_it(seed: int):
    curve = noisy([(step, law(step)) for step in STEPS], 0.02, seed)
    assert detect(curve, Detector(fitted=10)).turned is None
    assert detect(curve, Detector(fitted=10, sigmas=5.0)).broken is None


EVEN = list(range(10, 410, 10))


def alarms(value: Callable[[int], float], noise: float, detector: Detector) -> tuple[int, int]:
    """How many of 100 noisy curves at even steps leave their law, and how many turn."""
    found = [
        detect(noisy([(step, value(step)) for step in EVEN], noise, seed), detector)
        for seed in range(100)
    ]
    return sum(f.left is not None for f in found), sum(f.turned is not None for f in found)


@pytest.mark.parametrize(
    ("noise", "detector", "left", "turned"),
    [(0.02, Detector(), 6, 4), (0.005, MONITOR, 0, 0), (0.02, MONITOR, 6, 0)],
)
def test_a_noisy_law_at_even_steps_is_seldom_flagged(
    noise: float, detector: Detector, left: int, turned: int
):
    found = alarms(law, noise, detector)
    assert found[0] <= left
    assert found[1] <= turned


@pytest.mark.parametrize(("noise", "most"), [(0.005, 2), (0.02, 20)])
def test_what_wanders_about_a_level_is_seldom_said_to_rise(noise: float, most: int):
    assert alarms(lambda _step: 1.0, noise, MONITOR)[1] <= most


def test_a_rise_at_even_steps_is_seen():
    def turning(step: int) -> float:
        return law(step) + 0.003 * max(0, step - 200)

    for noise in (0.005, 0.02):
        left, turned = alarms(turning, noise, MONITOR)
        assert left == 100
        assert turned >= 95


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_that_turns_is_flagged_soon_after_it_turned(seed: int):
    turn = STEPS[11]
    curve = [(s, law(s) if s <= turn else law(turn) * (s / turn) ** 0.3) for s in STEPS]
    found = detect(noisy(curve, 0.005, seed))
    assert found.left is not None
    assert turn < found.left <= STEPS[14]
    assert found.turned is not None
    assert turn < found.turned <= STEPS[16]
    assert found.broken == min(found.left, found.turned)
    assert len(found.reasons) == 2


def test_a_plateau_leaves_the_law_but_does_not_rise():
    curve = [(step, max(law(step), law(STEPS[10]))) for step in STEPS]
    found = detect(curve)
    assert found.left in STEPS[11:14]
    assert found.turned is None
    assert "lies above the law" in found.reasons[0]


def test_a_curve_that_falls_faster_is_not_flagged():
    curve = [(s, law(s) if s <= STEPS[9] else law(s) * (s / STEPS[9]) ** -0.5) for s in STEPS]
    assert detect(curve).broken is None


def test_it_only_looks_backwards():
    turn = STEPS[11]
    curve = [(s, law(s) if s <= turn else law(turn) * (s / turn) ** 0.3) for s in STEPS]
    whole = detect(curve)
    for end in range(len(curve) + 1):
        part = detect(curve[:end])
        for name in ("left", "turned"):
            expected = getattr(whole, name)
            known = expected is not None and end > 0 and curve[end - 1][0] >= expected
            assert getattr(part, name) == (expected if known else None)


def test_the_warmup_is_left_out():
    curve = [(step, 1.0 + step / 100 if step <= 30 else law(step)) for step in STEPS]
    assert detect(curve).broken is not None or detect(curve).law.slope < 0.3
    assert detect(curve, Detector(warmup=30)).broken is None


def test_too_few_points_and_a_proxy_of_zero_tell_nothing():
    assert detect([]).law is None
    assert detect([(step, law(step)) for step in STEPS[:5]]).law is None
    assert detect([(step, 0.0) for step in STEPS]).law is None


def test_what_is_no_curve_is_refused():
    with pytest.raises(DataError, match="must rise"):
        detect([(2, 1.0), (2, 1.0)])
    with pytest.raises(DataError, match="at least 1"):
        detect([(0, 1.0)])
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(DataError, match="finite and at least 0"):
            detect([(1, wrong)])
    for name, value in (("fitted", 2), ("window", 3), ("warmup", -1), ("sigmas", 0.0)):
        with pytest.raises(ConfigError, match=name):
            Detector(**{name: value})


def curve(*means: float) -> list[Distance]:
    spread = [0.01 * (number % 7) for number in range(35)]
    return [Distance(prompts=tuple(mean + each for each in spread)) for mean in means]


@pytest.mark.parametrize(
    ("golden", "proxy", "kind", "lowest"),
    [
        ((3.0, 2.0, 2.5), (2.0, 1.5, 1.2), "hacking", 2),
        ((3.0, 2.0, 2.5), (2.0, 1.5, 1.5), "hacking", 2),
        ((3.0, 2.0, 2.5), (2.0, 1.0, 1.5), "overfitting", 2),
        ((3.0, 2.0, 1.5), (2.0, 1.0, 1.5), "none", 3),
    ],
)
def test_both_curves_together_are_judged(
    golden: tuple[float, ...], proxy: tuple[float, ...], kind: str, lowest: int
):
    found = judge([1, 2, 3], curve(*proxy), curve(*golden))
    assert (found.kind, found.lowest, found.interior) == (kind, lowest, lowest == 2)
    assert found.golden.mean == pytest.approx(golden[-1] - min(golden))


def test_a_rise_within_its_interval_is_none():
    low = Distance(prompts=tuple(float(n) for n in range(40)))
    moved = Distance(prompts=tuple(n + 0.01 + 0.5 * (-1) ** n for n in range(40)))
    assert judge([1, 2], [low, low], [low, moved]).kind == "none"


def test_curves_of_different_lengths_are_refused():
    with pytest.raises(DataError, match="2 updates, 1 proxies and 2 golden"):
        judge([1, 2], curve(1.0), curve(1.0, 2.0))
    with pytest.raises(DataError, match="0 updates"):
        judge([], [], [])


def steps(first: int, last: int) -> Iterator[Step]:
    for index in range(first, last):
        yield Step(
            index=index, loss=1.0, grad_norm=1.0, weight=1.0, learning_rate=1.0, report={"kl": 2.0}
        )


def test_a_watched_training_reports_the_proxy_and_warns_once_for_each_reason():
    turning = [law(n) if n <= 120 else law(120) * (n / 120) ** 0.5 for n in range(10, 301, 10)]
    told: list[str] = []
    values = iter(turning)
    found = list(watched(steps(0, 300), lambda: next(values), every=10, warn=told.append))
    assert [step.index for step in found] == list(range(300))
    measured = {step.index + 1: step.report["proxy"] for step in found if "proxy" in step.report}
    assert measured == dict(zip(range(10, 301, 10), turning, strict=True))
    assert all(step.report["kl"] == 2.0 for step in found)
    assert len(told) == 2
    assert "above the law" in told[0]
    assert "rising" in told[1]

    # Interrupted after it was told, it does not tell again, and detects the same.
    seen = [(step, value) for step, value in measured.items() if step <= 250]
    again: list[str] = []
    rest = iter(turning[25:])
    list(watched(steps(250, 300), lambda: next(rest), every=10, warn=again.append, seen=seen))
    assert again == []
    with pytest.raises(ConfigError, match="every"):
        next(watched(steps(0, 1), lambda: 1.0, every=0, warn=told.append))
