"""The learner's loss against a loop; what is exact on policy; cuts are worth what would come."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cabochon.algorithms import vtrace_agent
from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import (
    Finals,
    NetworkConfig,
    PolicyAndValue,
    Signature,
    build,
)
from cabochon.rl.collector import Collector
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.inference import sample
from cabochon.rl.server import ActingConfig
from cabochon.rl.unrolls import UnrollBatch
from cabochon.training.optimizers import OptimizerConfig, adamw

SEEN = Signature(shape=(3,), dtype="float32", actions=4)
LENGTH, ROWS = 6, 3


def network(**shape):
    return build(NetworkConfig(hidden=(8,), **shape), SEEN, PolicyAndValue, Key(2))


def random_batch(model, *, cut=(), ended=()):
    draw = torch.Generator().manual_seed(4)
    first = torch.zeros(LENGTH + 1, ROWS, dtype=torch.bool)
    terminated, truncated = first.clone(), first.clone()
    for time, row in cut:
        truncated[time, row] = True
    for time, row in ended:
        terminated[time, row] = True
    first |= terminated | truncated
    places = torch.tensor(cut, dtype=torch.int64).reshape(-1, 2)
    return UnrollBatch(
        observation=torch.randn(LENGTH + 1, ROWS, 3, generator=draw),
        previous_action=torch.randint(0, 4, (LENGTH + 1, ROWS), generator=draw),
        reward=torch.randn(LENGTH + 1, ROWS, generator=draw),
        first=first,
        terminated=terminated,
        truncated=truncated,
        action=torch.randint(0, 4, (LENGTH, ROWS), generator=draw),
        version=torch.zeros(LENGTH, ROWS, dtype=torch.int64),
        begins=torch.zeros(ROWS, dtype=torch.bool),
        outputs={"logits": torch.randn(LENGTH, ROWS, 4, generator=draw)},
        state=model.initial_state(ROWS),
        finals=Finals(places[:, 0], places[:, 1], torch.randn(len(cut), 3, generator=draw)),
    )


def by_loops(config, model, batch, final_values):
    """The loss of the module's first lines, one transition at a time."""
    said = model.unroll(
        batch.observation, batch.previous_action, batch.reward, batch.first, batch.state
    ).outputs
    logits, value = (said[name].detach().double().numpy() for name in ("logits", "value"))
    behaviour = batch.outputs["logits"].double().numpy()
    total = 0.0
    for row in range(ROWS):
        target = value[LENGTH, row]
        for t in range(LENGTH - 1, -1, -1):
            pi = np.exp(logits[t, row]) / np.exp(logits[t, row]).sum()
            mu = np.exp(behaviour[t, row]) / np.exp(behaviour[t, row]).sum()
            action = int(batch.action[t, row])
            rho = pi[action] / mu[action]
            reward, gamma = float(batch.reward[t + 1, row]), config.discount
            following, after = value[t + 1, row], target
            if batch.first[t + 1, row]:
                # Nothing of the next episode; of one cut short, the value of its last observation.
                following = after = final_values.get((t + 1, row), 0.0)
                carried = 0.0
            else:
                carried = gamma * min(1.0, rho) * (target - value[t + 1, row])
            advantage = min(1.0, rho) * (reward + gamma * after - value[t, row])
            delta = min(1.0, rho) * (reward + gamma * following - value[t, row])
            target = value[t, row] + delta + carried
            total -= np.log(pi[action]) * advantage
            total += config.baseline_cost * 0.5 * (target - value[t, row]) ** 2
            total -= config.entropy_cost * -(pi * np.log(pi)).sum()
    return total


def test_the_loss_is_that_of_a_loop_over_transitions():
    model, config = network(), vtrace_agent.Config(baseline_cost=0.7, entropy_cost=0.1)
    batch = random_batch(model, cut=[(2, 0), (6, 1)], ended=[(4, 0), (1, 2)])
    values = model.unroll(
        batch.observation, batch.previous_action, batch.reward, batch.first, batch.state,
        batch.finals,
    ).finals["value"]  # fmt: skip
    finals = {(2, 0): values[0].item(), (6, 1): values[1].item()}
    loss = vtrace_agent.objective(config)(model, batch)
    np.testing.assert_allclose(loss.total.item(), by_loops(config, model, batch, finals), rtol=1e-5)
    assert loss.weight.item() == LENGTH * ROWS


def test_an_episode_cut_short_is_not_one_that_ended():
    model, config = network(), vtrace_agent.Config()
    cut, ended = random_batch(model, cut=[(3, 1)]), random_batch(model, ended=[(3, 1)])
    objective = vtrace_agent.objective(config)
    assert objective(model, cut).total.item() != objective(model, ended).total.item()


def test_ratios_do_not_matter_where_none_are_taken():
    model = network()
    batch = random_batch(model)
    objective = vtrace_agent.objective(vtrace_agent.Config(correction="none"))
    before = objective(model, batch).total.item()
    batch.outputs["logits"].mul_(3.0)
    assert objective(model, batch).total.item() == before


def test_values_learn_from_the_value_error_alone_and_policies_do_not():
    model = network()
    batch = random_batch(model)
    config = vtrace_agent.Config(baseline_cost=0.0, entropy_cost=0.0)
    vtrace_agent.objective(config)(model, batch).total.backward()
    assert not model.head.value.weight.grad.any()
    assert model.head.policy.weight.grad.any()


def test_large_rewards_are_clipped_in_the_loss_alone():
    model = network()
    batch = random_batch(model)
    clipped = vtrace_agent.objective(vtrace_agent.Config(max_abs_reward=1.0))
    before = clipped(model, batch)
    batch.reward[batch.reward > 1.0] = 1e6
    after = clipped(model, batch)
    assert before.total.item() == after.total.item()
    assert after.report["reward"] > 1e5


def test_scaled_rewards_are_the_loss_of_smaller_rewards():
    model = network()
    batch = random_batch(model, cut=[(2, 0)], ended=[(4, 1)])
    scaled = vtrace_agent.objective(vtrace_agent.Config(reward_scale=0.25))(model, batch)
    clipped = vtrace_agent.objective(vtrace_agent.Config(reward_scale=0.25, max_abs_reward=0.25))
    smaller = replace(batch, reward=0.25 * batch.reward)
    plain = vtrace_agent.objective(vtrace_agent.Config())
    assert scaled.total.item() == plain(model, smaller).total.item()
    assert scaled.report["reward"] == batch.reward[1:].sum()
    within = replace(batch, reward=0.25 * batch.reward.clamp(-1.0, 1.0))
    assert clipped(model, batch).total.item() == plain(model, within).total.item()


def cartpole(seed=0, runtime="inline", **method):
    spec, key = EnvironmentSpec(name="CartPole-v1"), Key(seed)
    config = vtrace_agent.Config(**{"steps": 6, "unroll_length": 5, "batch_size": 4, **method})
    model = build(
        NetworkConfig(hidden=(16,), lstm=8, previous=True), signature_of(spec), PolicyAndValue, key
    )
    optimizer = adamw(model, OptimizerConfig(learning_rate=3e-3, weight_decay=0.0))
    collector = Collector(
        model, spec, sample, key, acting=ActingConfig(actors=2, environments=2),
        cutting=config.cutting, runtime=runtime,
    )  # fmt: skip
    return config, model, collector, optimizer


def test_without_lag_every_ratio_is_one_and_the_correction_changes_nothing():
    results = []
    for correction in ("vtrace", "none"):
        config, model, collector, optimizer = cartpole(correction=correction)
        with collector:
            for step in vtrace_agent.train(config, model, collector, optimizer):
                assert abs(step.report["rho"] - 1.0) < 1e-5
                assert step.report["lag_max"] == 0
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_with_lag_ratios_leave_one():
    config, model, collector, optimizer = cartpole(lag=3)
    with collector:
        steps = list(vtrace_agent.train(config, model, collector, optimizer))
    assert [step.report["lag"] for step in steps] == [0, 1, 2, 3, 3, 3]
    assert steps[-1].report["kl_behaviour"] != 0.0


@pytest.mark.parametrize("runtime", ["threads", "processes"])
def test_the_same_trains_beside_the_actors(runtime):
    config, model, collector, optimizer = cartpole(runtime=runtime, max_lag=10)
    with collector:
        steps = list(vtrace_agent.train(config, model, collector, optimizer))
    assert len(steps) == 6
    assert steps[-1].report["frames"] >= 6 * 20
    assert all(math.isfinite(step.loss) for step in steps)


def test_what_cannot_be_is_refused():
    nan = float("nan")
    for wrong in (
        {"discount": 1.1}, {"rho_bar": 0.5}, {"batch_size": 0}, {"trace": -1.0},
        {"max_abs_reward": 0.0}, {"max_abs_reward": nan}, {"max_grad_norm": -1.0},
        {"baseline_cost": nan}, {"entropy_cost": nan}, {"kl_cost": math.inf},
        {"reward_scale": 0.0}, {"reward_scale": math.inf},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong)).rpartition("_")[2]):
            vtrace_agent.Config(**wrong)
    _, model, collector, optimizer = cartpole()
    with pytest.raises(ConfigError, match="older than max_lag 1"):
        vtrace_agent.Config(lag=2, max_lag=1)
    vtrace_agent.Config(lag=1, max_lag=1, accumulate=2)  # both are updates
    with pytest.raises(ConfigError, match="the collector cuts"):
        next(vtrace_agent.train(vtrace_agent.Config(), model, collector, optimizer))
