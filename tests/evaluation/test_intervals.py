"""The bootstrap agrees with what is known of a mean."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.evaluation.intervals import bootstrap, mean_interval


def test_the_interval_of_many_equal_documents_is_that_of_the_central_limit_theorem():
    # Equal lengths: the figure is a mean of n, and its 95% interval is +- 1.96 s / sqrt(n).
    count = 400
    values = Key(1).numpy().normal(3.0, 0.5, size=count)
    low, high = bootstrap(values * 100.0, np.full(count, 100), Key(2))
    half = 1.96 * values.std() / math.sqrt(count)
    # A quantile of 1000 resamples is itself uncertain: about 0.06 standard errors each, so 10%.
    assert high - low == pytest.approx(2 * half, rel=0.15)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.3 * half)


def test_a_mean_is_a_sum_over_documents_of_one_unit():
    values = Key(3).numpy().normal(size=30).tolist()
    assert mean_interval(values) == bootstrap(values, [1] * 30)


def test_a_single_value_tells_of_no_other():
    assert mean_interval([1.0]) is None
