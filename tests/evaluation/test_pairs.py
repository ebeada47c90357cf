"""Accuracy on pairs: by hand, with its interval."""

from __future__ import annotations

import math

import pytest
import torch

from cabochon.core.errors import DataError, NonFinite
from cabochon.evaluation.pairs import pair_accuracy


def test_accuracy_counts_ties_as_half() -> None:
    found = pair_accuracy(torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.pairs == 4
    assert found.margin == pytest.approx(0.25)
    expected = (2 * math.log1p(math.exp(-1)) + math.log1p(math.e) + math.log(2)) / 4
    assert found.loss == pytest.approx(expected)
    assert found.interval is not None
    assert found.interval[0] <= found.accuracy <= found.interval[1]
    assert not found.decided


def test_many_right_pairs_decide_and_one_tells_of_no_other() -> None:
    assert pair_accuracy(torch.ones(100), torch.zeros(100)).decided
    assert pair_accuracy(torch.ones(1), torch.zeros(1)).interval is None


def test_what_is_no_score_is_refused() -> None:
    with pytest.raises(DataError, match="at least one pair"):
        pair_accuracy(torch.zeros(0), torch.zeros(0))
    with pytest.raises(NonFinite, match="pair 1"):
        pair_accuracy(torch.tensor([1.0, float("nan")]), torch.zeros(2))
