"""The gradient of an expectation over draws, and its baselines."""

from __future__ import annotations

import itertools

import pytest
import torch

from cabochon.core import Key, LinearPrediction, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.losses import linear
from cabochon.losses.policy_gradient import (
    Correction,
    future_sums,
    leave_one_out,
    off_policy_gradient,
    policy_gradient,
    standardised,
)


def prediction(seed: int, rows: int = 2, length: int = 4) -> LinearPrediction:
    generator = Key(seed).generator()
    hidden = torch.randn(rows, length, 6, generator=generator, dtype=torch.float64)
    head = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    return LinearPrediction(hidden=hidden.requires_grad_(), head=head.requires_grad_(), cap=5.0)


def batch() -> TokenBatch:
    return TokenBatch.of([[1, 2, 3, 4], [5, 6, 7]], masks=[[False, False, True, True], [True] * 3])


def test_the_loss_is_the_weighted_sum_of_surprisals_for_gains_of_either_sign() -> None:
    given, rows = prediction(0), batch()
    gain = torch.tensor([[9.0, -2.0, 0.5, 9.0], [1.5, 0.0, 9.0, 9.0]])
    loss = policy_gradient(given, rows, gain)
    logprob = given.logits(slice(None)).log_softmax(-1)
    own = logprob.gather(-1, rows.targets.flatten()[:, None]).view(rows.shape)
    wanted = -(gain * own)[rows.mask].sum()
    assert loss.weight.item() == 4
    torch.testing.assert_close(loss.total, wanted, check_dtype=False, atol=1e-5, rtol=1e-5)
    found, expected = (
        torch.autograd.grad(total, (given.hidden, given.head), retain_graph=True)
        for total in (loss.total, wanted)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, atol=1e-5, rtol=1e-5)


def test_gains_of_1_are_the_cross_entropy() -> None:
    given, rows = prediction(1), batch()
    loss = policy_gradient(given, rows, torch.ones(rows.shape))
    torch.testing.assert_close(loss.total, linear.cross_entropy(given, rows).total)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    wanted = torch.tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]])
    torch.testing.assert_close(leave_one_out(values), wanted)
    torch.testing.assert_close(leave_one_out(values + 100.0), wanted)
    assert leave_one_out(torch.tensor([5.0])).item() == 0.0
    with pytest.raises(ConfigError, match="at least one value"):
        leave_one_out(torch.zeros(2, 0))


def test_a_leave_one_out_baseline_changes_no_expected_gradient() -> None:
    """Over all pairs of draws of three outcomes, by enumeration."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    prob = logits.softmax(-1)
    wanted = torch.autograd.grad((prob * reward).sum(), logits, retain_graph=True)[0]
    total = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        chance = (prob[pair[0]] * prob[pair[1]]).detach()
        gain = leave_one_out(reward[list(pair)])
        total = total + chance * (gain * prob[list(pair)].log()).mean()
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], wanted)


def test_future_sums_leave_the_place_itself_out() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 16.0]])
    wanted = torch.tensor([[6.0, 4.0, 0.0], [16.0, 16.0, 0.0]])
    torch.testing.assert_close(future_sums(values), wanted)


def test_large_rewards_keep_what_they_differ_by() -> None:
    """In float32 2^24 + 2 and its neighbours have sums that lose the difference."""
    rewards = torch.tensor([16777216.0, 16777218.0, 16777216.0, 16777220.0])
    expected = torch.tensor([-2.0, 2.0 / 3.0, -2.0, 10.0 / 3.0])
    torch.testing.assert_close(leave_one_out(rewards), expected)
    assert leave_one_out(torch.tensor([3e38, -3e38])).isneginf().any()  # 6e38 has no float32
    spread = standardised(torch.tensor([3e38, 2e38, 1e38]))
    assert spread.tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)


def test_a_ratio_beyond_all_numbers_is_none_where_nothing_is_gained() -> None:
    given, rows = prediction(0), batch()
    drawn = torch.full((2, 4), -200.0)
    for level in ("token", "sequence"):
        correction = Correction(kind="clip", level=level)
        loss = off_policy_gradient(given, rows, torch.zeros(2, 4), drawn, correction)
        assert float(loss.total.detach()) == 0.0
        assert all(bool(each.isfinite()) for each in loss.report.values())
