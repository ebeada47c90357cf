"""V-trace against a double loop, pinned numbers of another library, its limits and fixed point."""

import math

import numpy as np
import pytest
import torch

from cabochon.core.errors import ConfigError
from cabochon.losses.vtrace import vtrace


def by_sums(log_rhos, rewards, discounts, values, bootstrap, trace, rho_bar, c_bar, rho_bar_pg):
    """The definition: v_s = V_s + sum_t (prod gamma c) delta_t, a double loop in float64."""
    length = len(rewards)
    rhos = np.exp(log_rhos)
    following = np.concatenate([values[1:], bootstrap[None]])
    deltas = np.minimum(rho_bar, rhos) * (rewards + discounts * following - values)
    targets = values.copy()
    for s in range(length):
        weight = np.ones_like(bootstrap)
        for t in range(s, length):
            targets[s] += weight * deltas[t]
            weight = weight * discounts[t] * trace * np.minimum(c_bar, rhos[t])
    later = np.concatenate([targets[1:], bootstrap[None]])
    return targets, np.minimum(rho_bar_pg, rhos) * (rewards + discounts * later - values)


def random_inputs(length=5, rows=5, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "log_rhos": draw.uniform(-2.5, 2.5, (length, rows)),
        "rewards": draw.normal(size=(length, rows)),
        "discounts": 0.97 * (draw.random((length, rows)) > 0.2),
        "values": draw.normal(size=(length, rows)),
        "bootstrap": draw.normal(size=rows),
    }


def of_torch(inputs, **options):
    return vtrace(**{k: torch.tensor(v) for k, v in inputs.items()}, **options)


@pytest.mark.parametrize("trace", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("bounds", [(1.0, 1.0, 1.0), (3.7, 1.0, 2.2), (math.inf, 1.0, math.inf)])
def test_it_equals_the_sum_that_defines_it(trace, bounds):
    rho_bar, c_bar, rho_bar_pg = bounds
    for seed in range(5):
        inputs = random_inputs(seed=seed)
        ours = of_torch(
            inputs, trace=trace, rho_bar=rho_bar, c_bar=c_bar, rho_bar_advantage=rho_bar_pg
        )
        targets, advantages = by_sums(
            **inputs, trace=trace, rho_bar=rho_bar, c_bar=c_bar, rho_bar_pg=rho_bar_pg
        )
        np.testing.assert_allclose(ours.targets, targets, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.advantages, advantages, rtol=1e-5, atol=1e-5)


def test_it_gives_the_numbers_that_rlax_pins():
    """Inputs and results of rlax's own test of its td errors and advantages (T 4, B 2)."""
    behaviour = torch.tensor(
        [
            [[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
            [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]],
        ]
    )
    target = torch.tensor(
        [
            [[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]],
            [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]],
        ]
    )
    actions = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]]).unsqueeze(-1)
    ratio = target.log_softmax(-1) - behaviour.log_softmax(-1)
    values = torch.tensor([[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]])
    found = vtrace(
        ratio.gather(-1, actions).squeeze(-1).T,
        torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]]).T,
        torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]]).T,
        values.T,
        torch.tensor([8.4, -1.2]),
    )
    errors = torch.tensor(
        [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327e-5, -13.54]]
    )
    torch.testing.assert_close((found.targets.T - values), errors, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.advantages.T, errors, rtol=1e-3, atol=1e-5)


def test_on_policy_it_is_the_n_step_return():
    inputs = random_inputs() | {"log_rhos": np.zeros((5, 5))}
    returns, later = [], inputs["bootstrap"]
    for t in range(4, -1, -1):
        later = inputs["rewards"][t] + inputs["discounts"][t] * later
        returns.insert(0, later)
    found = of_torch(inputs)
    np.testing.assert_allclose(found.targets, returns, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.advantages, returns - inputs["values"], rtol=1e-5, atol=1e-5)


def test_nothing_after_an_end_reaches_what_was_before_it():
    inputs = random_inputs()
    inputs["discounts"][2] = 0.0
    before = of_torch(inputs)
    for name in ("log_rhos", "rewards", "values"):
        inputs[name][3:] += 7.0
    inputs["bootstrap"] += 7.0
    after = of_torch(inputs)
    assert torch.equal(before.targets[:3], after.targets[:3])
    assert torch.equal(before.advantages[:3], after.advantages[:3])
    assert not torch.equal(before.targets[3:], after.targets[3:])


def test_a_bound_of_zero_learns_nothing():
    inputs = random_inputs()
    found = of_torch(inputs, rho_bar=0.0, c_bar=0.0, rho_bar_advantage=0.0)
    np.testing.assert_allclose(found.targets, inputs["values"], rtol=1e-6)
    assert not found.advantages.any()


def test_without_a_trace_it_looks_one_transition_ahead():
    inputs = random_inputs()
    following = np.concatenate([inputs["values"][1:], inputs["bootstrap"][None]])
    rho = np.minimum(1.0, np.exp(inputs["log_rhos"]))
    error = rho * (inputs["rewards"] + inputs["discounts"] * following - inputs["values"])
    found = of_torch(inputs, trace=0.0)
    np.testing.assert_allclose(found.targets, inputs["values"] + error, rtol=1e-5, atol=1e-5)


def test_no_gradient_flows_through_targets_and_advantages():
    inputs = {k: torch.tensor(v, requires_grad=True) for k, v in random_inputs().items()}
    found = vtrace(**inputs)
    assert not found.targets.requires_grad
    assert not found.advantages.requires_grad


def test_one_transition_is_enough_and_none_is_refused():
    one = random_inputs(length=1)
    found = of_torch(one)
    rho = np.minimum(1.0, np.exp(one["log_rhos"][0]))
    error = one["rewards"][0] + one["discounts"][0] * one["bootstrap"] - one["values"][0]
    np.testing.assert_allclose(found.advantages[0], rho * error, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="at least one transition"):
        of_torch(random_inputs(length=0))


def test_what_does_not_fit_is_refused():
    inputs = random_inputs()
    with pytest.raises(ConfigError, match="bootstrap"):
        of_torch(inputs | {"bootstrap": np.zeros(4)})
    with pytest.raises(ConfigError, match="lambda"):
        of_torch(inputs, trace=1.5)
    with pytest.raises(ConfigError, match="rho_bar"):
        of_torch(inputs, rho_bar=0.5)


def test_the_fixed_point_is_the_value_of_the_bounded_policy():
    """Exact sweeps over a random five-state world: the expected update's fixed point.

    The ratio's bound moves it away from the value of the target policy, and the bound's absence
    brings it there.
    """
    draw = np.random.default_rng(3)
    states, actions, gamma = 5, 3, 0.9
    moves = draw.dirichlet(np.ones(states), (states, actions))
    reward = draw.normal(size=(states, actions))
    mu, pi = draw.dirichlet(np.ones(actions), states), draw.dirichlet(np.ones(actions), states)

    def value_of(policy):
        transition = np.einsum("sa,saz->sz", policy, moves)
        return np.linalg.solve(np.eye(states) - gamma * transition, (policy * reward).sum(1))

    def swept(rho_bar):
        # Every (state, action, next state) once, weighted by its probability under mu.
        s, a, z = (each.ravel() for each in np.indices(moves.shape))
        probability = torch.tensor(mu[s, a] * moves[s, a, z])
        value = torch.zeros(states)
        for _ in range(1500):
            found = vtrace(
                torch.tensor(np.log(pi[s, a] / mu[s, a]))[None],
                torch.tensor(reward[s, a])[None],
                torch.full((1, len(s)), gamma),
                value[s][None],
                value[z],
                rho_bar=rho_bar,
            )
            change = probability * (found.targets[0] - value[s])
            value = value + torch.zeros(states).index_add_(0, torch.tensor(s), change.float())
        return value.numpy()

    bounded = np.minimum(mu, pi) / np.minimum(mu, pi).sum(1, keepdims=True)
    np.testing.assert_allclose(swept(1.0), value_of(bounded), atol=2e-3)
    np.testing.assert_allclose(swept(math.inf), value_of(pi), atol=2e-3)
    assert np.abs(value_of(bounded) - value_of(pi)).max() > 0.1
