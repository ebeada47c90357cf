"""The records: what a batch of sequences says of targets, masks and padding."""

import math

import pytest
import torch

from cabochon.core import LinearPrediction, TokenBatch, soft_cap
from cabochon.core.errors import ConfigError


def test_a_target_is_the_token_that_follows_and_the_last_token_has_none() -> None:
    batch = TokenBatch.of([[5, 6, 7], [8, 9]])
    assert batch.targets[0, :2].tolist() == [6, 7]
    assert batch.mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.documents.tolist() == [[0, 0, 0], [0, 0, -1]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]]


def test_left_padding_moves_the_row_and_keeps_its_positions() -> None:
    right, left = TokenBatch.of([[5, 6, 7], [8, 9]]), TokenBatch.of([[5, 6, 7], [8, 9]], left=True)
    for name in ("tokens", "positions", "documents"):
        assert getattr(left, name)[1, 1:].tolist() == getattr(right, name)[1, :2].tolist()
    assert left.targets[left.mask].tolist() == right.targets[right.mask].tolist()


def test_a_mask_belongs_to_the_token_it_names_not_to_the_place_that_predicts_it() -> None:
    batch = TokenBatch.of([[5, 6, 7, 8]], masks=[[True, False, True, True]])
    assert batch.targets[batch.mask].tolist() == [7, 8]


def test_empty_sequences_and_masks_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        TokenBatch.of([[1], []])
    with pytest.raises(ValueError, match="must agree"):
        TokenBatch.of([[1, 2]], masks=[[True]])


def test_a_prediction_unembeds_only_the_rows_it_is_asked_for() -> None:
    hidden, head = torch.randn(2, 3, 4), torch.randn(7, 4)
    prediction = LinearPrediction(hidden=hidden, head=head, cap=2.0)
    dense = 2.0 * torch.tanh(hidden.reshape(6, 4) @ head.T / 2.0)
    torch.testing.assert_close(prediction.logits(torch.tensor([4, 1])), dense[[4, 1]])
    torch.testing.assert_close(prediction.tempered(0.5).logits(slice(0, 2)), dense[:2] / 0.5)


def test_a_soft_cap_bounds_is_odd_and_vanishes_as_it_grows() -> None:
    x = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    assert soft_cap(x, 30.0).abs().max() <= 30.0
    torch.testing.assert_close(soft_cap(-x, 30.0), -soft_cap(x, 30.0))
    small = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(soft_cap(small, 1e6), small, rtol=0, atol=1e-9)
    assert soft_cap(x, None) is x


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_a_number_above_0(temperature: float) -> None:
    prediction = LinearPrediction(hidden=torch.ones(1, 1, 2), head=torch.ones(3, 2))
    with pytest.raises(ConfigError, match="temperature"):
        prediction.tempered(temperature)


def test_a_soft_cap_is_above_0() -> None:
    with pytest.raises(ConfigError, match="soft-cap"):
        LinearPrediction(hidden=torch.ones(1, 1, 2), head=torch.ones(3, 2), cap=0.0)
