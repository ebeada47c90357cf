"""Value rescaling, n-step double Q targets, priorities: against loops, numbers by hand, limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.losses.temporal_difference import (
    double_q_values,
    importance_weights,
    n_step_targets,
    rescale,
    sequence_losses,
    sequence_priorities,
    unscale,
)


def test_rescaling_by_hand() -> None:
    # sqrt(3 + 1) - 1 = 1; sqrt(99 + 1) - 1 = 9.
    found = rescale(torch.tensor([0.0, 3.0, -3.0, 99.0], dtype=torch.float64))
    wanted = torch.tensor([0.0, 1.0 + 3e-3, -1.0 - 3e-3, 9.0 + 0.099], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1e-2, 1.0])
def test_the_inverse_undoes_the_rescaling_from_tiny_to_huge_values(epsilon: float) -> None:
    sizes = torch.logspace(-12, 8, 401, dtype=torch.float64)
    x = torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float64), sizes])
    torch.testing.assert_close(unscale(rescale(x, epsilon), epsilon), x, rtol=2e-15, atol=0.0)
    torch.testing.assert_close(rescale(unscale(x, epsilon), epsilon), x, rtol=2e-15, atol=0.0)


def test_float32_keeps_its_digits() -> None:
    x = torch.linspace(-1e4, 1e4, 20_001)
    torch.testing.assert_close(unscale(rescale(x)), x, rtol=6e-7, atol=0.0)
    exact = unscale(x.double()[::97] / 100.0)
    torch.testing.assert_close(unscale(x[::97] / 100.0), exact.float(), rtol=6e-7, atol=0.0)


def test_the_inverse_is_the_published_formula() -> None:
    e = 1e-3
    x = torch.linspace(-100.0, 100.0, 2001, dtype=torch.float64)
    root = ((1 + 4 * e * (x.abs() + 1 + e)).sqrt() - 1) / (2 * e)
    torch.testing.assert_close(unscale(x, e), x.sign() * (root**2 - 1), rtol=1e-9, atol=1e-9)


def test_rescaling_is_odd_and_strictly_increasing_with_its_slopes() -> None:
    x = torch.linspace(-1000.0, 1000.0, 4001, dtype=torch.float64, requires_grad=True)
    y = rescale(x)
    torch.testing.assert_close(rescale(-x), -y, rtol=0.0, atol=0.0)
    assert (y[1:] > y[:-1]).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    wanted = 0.5 / (x.detach().abs() + 1).sqrt() + 1e-3  # 1/2 + e at 0, where |x| has no slope
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=0.0)
    values = y.detach().requires_grad_()
    (slope_back,) = torch.autograd.grad(unscale(values).sum(), values)
    torch.testing.assert_close(slope_back, 1.0 / wanted, rtol=1e-9, atol=0.0)


def test_a_negative_epsilon_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        rescale(torch.zeros(1), -1.0)
    with pytest.raises(ConfigError, match="at least 0"):
        unscale(torch.zeros(1), math.nan)


def test_double_q_judges_the_action_that_the_other_network_prefers() -> None:
    online = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    target = torch.tensor([[10.0, 20.0, 30.0], [7.0, 8.0, 9.0]])
    assert double_q_values(online, target).tolist() == [20.0, 7.0]
    assert double_q_values(target, target).tolist() == target.amax(-1).tolist()


def followed(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    final_values: Tensor,
    discount: float,
    steps: int,
) -> np.ndarray:
    """One start after another, one step after another."""
    length, rows = rewards.shape
    found = np.zeros((length, rows))
    for b in range(rows):
        for start in range(length):
            total, factor, t = 0.0, 1.0, start
            while True:
                if t == length or t == start + steps:
                    total += factor * float(values[t, b])
                    break
                total += factor * float(rewards[t, b])
                factor *= discount
                if terminated[t, b]:
                    break
                if truncated[t, b]:
                    total += factor * float(final_values[t, b])
                    break
                t += 1
            found[start, b] = total
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 40])
@pytest.mark.parametrize("seed", range(4))
def test_n_step_targets_follow_every_episode_to_its_end(steps: int, seed: int) -> None:
    draw = Key(seed).fold("targets", steps).numpy()
    length, rows = 9, 6
    rewards, final = (torch.from_numpy(draw.normal(size=(length, rows))) for _ in range(2))
    values = torch.from_numpy(draw.normal(size=(length + 1, rows)))
    terminated, truncated = (torch.from_numpy(draw.random((length, rows)) < 0.2) for _ in range(2))
    found = n_step_targets(rewards, terminated, truncated, values, final, discount=0.9, steps=steps)
    wanted = followed(rewards, terminated, truncated, values, final, 0.9, steps)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0.0, atol=1e-12)


def test_n_step_targets_by_hand() -> None:
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    values = torch.tensor([[100.0], [10.0], [20.0], [40.0]])
    no = torch.zeros(3, 1, dtype=torch.bool)
    final = torch.full((3, 1), 1000.0)

    def targets(terminated: Tensor, truncated: Tensor, steps: int) -> list[float]:
        found = n_step_targets(
            rewards, terminated, truncated, values, final, discount=0.5, steps=steps
        )
        return found.squeeze(1).tolist()

    assert targets(no, no, 1) == [6.0, 12.0, 24.0]
    assert targets(no, no, 2) == [1 + 1 + 0.25 * 20, 2 + 2 + 0.25 * 40, 4 + 20]
    second = torch.tensor([[False], [True], [False]])
    assert targets(second, no, 2) == [1 + 1, 2, 24.0]  # over: nothing afterwards
    assert targets(no, second, 2) == [1 + 1 + 250, 2 + 500, 24.0]  # cut: it would have gone on
    assert targets(second, second, 2) == targets(second, no, 2)


def test_what_lies_behind_an_end_changes_no_target_before_it() -> None:
    draw = Key(7).fold("behind").numpy()
    rewards, final = (torch.from_numpy(draw.normal(size=(8, 3))) for _ in range(2))
    values = torch.from_numpy(draw.normal(size=(9, 3)))
    over = torch.zeros(8, 3, dtype=torch.bool)
    over[4] = True
    later = rewards.clone()
    later[5:] += 100.0
    other = values.clone()
    other[5:] = torch.nan  # not even a value that is none
    for terminated, truncated in ((over, ~over & False), (~over & False, over)):
        one, two = (
            n_step_targets(r, terminated, truncated, v, final, discount=0.99, steps=5)
            for r, v in ((rewards, values), (later, other))
        )
        assert torch.equal(one[:5], two[:5])


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"discount": 1.1}, {"discount": math.nan}, {"values": torch.zeros(4, 2)}],
)
def test_targets_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    no = torch.zeros(4, 2, dtype=torch.bool)
    given = {"values": torch.zeros(5, 2), "discount": 0.9, "steps": 2} | change
    with pytest.raises(ConfigError, match="got"):
        n_step_targets(
            torch.zeros(4, 2),
            no,
            no,
            final_values=torch.zeros(4, 2),
            **given,  # type: ignore[arg-type]
        )


def test_losses_and_priorities_count_what_is_learned_alone() -> None:
    errors = torch.tensor([[9.0, 9.0], [3.0, -1.0], [-1.0, 2.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, False], [True, False]])
    assert sequence_losses(errors, mask).tolist() == [5.0, 0.0]
    priorities = sequence_priorities(errors, mask, eta=0.9)
    assert priorities.tolist() == pytest.approx([0.9 * 3 + 0.1 * 2, 0.0])
    assert not priorities.requires_grad
    with pytest.raises(ConfigError, match="eta"):
        sequence_priorities(errors, mask, eta=1.5)


def test_importance_weights_are_1_at_most_and_undo_the_sampling() -> None:
    chance = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    weights = importance_weights(chance, 4, 0.6)
    plain = (1.0 / (4 * chance)) ** 0.6
    torch.testing.assert_close(weights, plain / plain.max())
    assert importance_weights(chance, 4, 0.0).tolist() == [1.0] * 4
    full = chance * importance_weights(chance, 4, 1.0)  # the expectation of a uniform draw
    torch.testing.assert_close(full, full[:1].expand(4))
    with pytest.raises(ConfigError, match="above 0"):
        importance_weights(torch.tensor([0.5, 0.0]), 2)
