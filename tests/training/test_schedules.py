from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError
from cabochon.training import constant, cosine, linear
from cabochon.training.schedules import scheduled


def test_cosine_by_hand() -> None:
    """Warm-up of 2, then half a cosine over updates 2 to 10: 0.2 + 0.8 (1 + cos) / 2."""
    schedule = cosine(total=11, warmup=2, floor=0.2)
    assert [schedule(i) for i in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert schedule(4) == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))  # an eighth turn
    assert schedule(6) == pytest.approx(0.6)
    assert schedule(8) == pytest.approx(0.2 + 0.4 * (1 - math.sqrt(0.5)))
    assert schedule(10) == pytest.approx(0.2)
    assert schedule(1000) == pytest.approx(0.2)


def test_linear_by_hand() -> None:
    schedule = linear(total=11, warmup=2, floor=0.2)
    found = [schedule(i) for i in (0, 1, 2, 4, 6, 10, 99)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.2, 0.2])


def test_constant_by_hand() -> None:
    schedule = constant(warmup=4)
    assert [schedule(i) for i in (0, 1, 2, 3, 4, 500)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert constant()(0) == 1.0


@given(
    total=st.integers(1, 300),
    share=st.floats(0, 1),
    floor=st.floats(0, 1),
    make=st.sampled_from([cosine, linear]),
)
def test_decays_rise_then_fall_and_stay_between_floor_and_one(total, share, floor, make) -> None:
    warmup = int(share * total)
    schedule = make(total=total, warmup=warmup, floor=floor)
    heights = [schedule(i) for i in range(total)]
    rise, fall = heights[:warmup], heights[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(0 < height <= 1 for height in rise)
    assert all(floor - 1e-12 <= height <= 1 for height in fall)
    if len(fall) > 1:
        assert fall[0] == 1.0
        assert fall[-1] == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"warmup": 12}, {"warmup": -1}, {"floor": 1.1}, {"floor": -0.1}])
@pytest.mark.parametrize("make", [cosine, linear])
def test_a_warmup_or_floor_out_of_range_is_refused(make, wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make(total=11, **wrong)


def test_a_negative_warmup_of_constant_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup"):
        constant(warmup=-1)


def test_a_named_schedule_is_that_schedule_with_a_usual_warm_up() -> None:
    asked, plain = scheduled("linear", total=100, floor=0.0), linear(total=100, warmup=10)
    assert [asked(i) for i in range(100)] == [plain(i) for i in range(100)]
    assert scheduled("cosine", total=10_000)(49) == 1.0 > scheduled("cosine", total=10_000)(48)
    assert scheduled("constant", total=5, warmup=0)(4) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_warm_up_longer_than_the_run_is_refused_not_shortened(kind) -> None:
    with pytest.raises(ConfigError, match="between 0 and the 10 updates, got 11"):
        scheduled(kind, total=10, warmup=11)
