"""R2D2: errors step by step, states that fit their sequences, an exact ratio, resumption."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("gymnasium")

from cabochon.algorithms import r2d2
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import temporal_difference as td
from cabochon.models.agents.networks import AgentNetwork, NetworkConfig, Signature, build
from cabochon.models.agents.q_network import q_head
from cabochon.rl.collector import Collector
from cabochon.rl.environment import EnvironmentSpec
from cabochon.rl.exploration import epsilon_greedy, epsilons
from cabochon.rl.replay import Pace, Replay
from cabochon.rl.sequences import SequenceBatch, items_of
from cabochon.rl.server import ActingConfig
from cabochon.rl.unrolls import Unroll
from cabochon.training.optimizers import OptimizerConfig, adamw

SEEN = Signature(shape=(3,), dtype="float32", actions=4)


def network(seed: int, lstm: int = 6) -> AgentNetwork:
    config = NetworkConfig(hidden=(8,), lstm=lstm, frame_stack=2, previous=True)
    return build(config, SEEN, q_head(5), Key(seed))


def target_of(learner: AgentNetwork) -> AgentNetwork:
    return copy.deepcopy(learner).requires_grad_(False)


def unrolled(seed: int, times: int, finals: int = 3) -> Unroll:
    """A stretch of a life full of ends and cuts."""
    draw = Key(seed).fold("life").numpy()
    over = draw.random(times) < 0.35
    over[0] = False
    cut = over & (draw.random(times) < 0.5)
    cut &= cut.cumsum() <= finals
    action = draw.integers(4, size=times - 1)
    steps = np.flatnonzero(cut)
    return Unroll(
        environment=0,
        run=0,
        begins=False,
        observation=draw.normal(size=(times, 3)).astype(np.float32),
        previous_action=np.concatenate([[1], action]),
        reward=(5 * draw.normal(size=times)).astype(np.float32),
        first=over,
        terminated=over & ~cut,
        truncated=cut,
        action=action,
        outputs={"q": draw.normal(size=(times - 1, 4)).astype(np.float32)},
        version=np.zeros(times - 1, np.int64),
        state=(
            draw.normal(size=(1, 3)).astype(np.float32),
            *(draw.normal(size=6).astype(np.float32) for _ in range(2)),
        ),
        final_step=steps,
        final_observation=draw.normal(size=(len(steps), 3)).astype(np.float32),
    )


def batch_of(config: r2d2.Config, learner: AgentNetwork, unrolls: list[Unroll]) -> SequenceBatch:
    replay = r2d2.new_replay(config, learner)
    for unroll in unrolls:
        replay.insert(items_of(unroll, config.finals), np.ones(1))
    drawn = replay.draw(400, Key(0).numpy())
    first = np.array([np.flatnonzero(drawn.numbers == n)[0] for n in range(len(unrolls))])
    items = {name: value[first] for name, value in drawn.items.items()}
    ordered = type(drawn)(
        numbers=drawn.numbers[first],
        probabilities=drawn.probabilities[first],
        stored=drawn.stored,
        items=items,
    )
    return SequenceBatch.of(ordered, torch.ones(len(unrolls)))


def said_of(net: AgentNetwork, unroll: Unroll) -> tuple[list[Tensor], dict[int, Tensor]]:
    """q at every time, and of the observations that cut episodes were left in, step by step."""
    state = tuple(torch.from_numpy(part)[None] for part in unroll.state)
    values, lefts = [], {}
    with torch.no_grad():
        for t in range(len(unroll.first)):
            led = [
                torch.from_numpy(np.array([x[t]])) for x in (unroll.previous_action, unroll.reward)
            ]
            if unroll.truncated[t]:
                place = int(np.flatnonzero(unroll.final_step == t)[0])
                last = torch.from_numpy(unroll.final_observation[place])[None]
                said, _ = net(last, *led, torch.tensor([False]), state)
                lefts[t] = said["q"][0]
            seen = torch.from_numpy(unroll.observation[t])[None]
            said, state = net(seen, *led, torch.tensor([bool(unroll.first[t])]), state)
            values.append(said["q"][0])
    return values, lefts


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("double", [True, False])
def test_errors_are_those_of_following_every_step(burn_in: int, double: bool) -> None:
    config = r2d2.Config(
        burn_in=burn_in,
        unroll_length=8,
        horizon=3,
        discount=0.9,
        double=double,
        finals=4,
        capacity=99,
    )
    learner, target = network(1), target_of(network(2))
    unrolls = [unrolled(seed, burn_in + 9) for seed in range(6)]
    errors, chosen = r2d2.td_errors(config, learner, target, batch_of(config, learner, unrolls))
    assert errors.requires_grad
    for b, unroll in enumerate(unrolls):
        own, own_left = said_of(learner, unroll)
        other, other_left = said_of(target, unroll)

        def worth(a: Tensor, b: Tensor) -> float:
            return float(td.unscale(b[(a if double else b).argmax()]))

        for start in range(burn_in, burn_in + 8):
            total, factor, t = 0.0, 1.0, start
            while t < min(start + 3, burn_in + 8):
                total += factor * float(unroll.reward[t + 1])
                factor *= 0.9
                t += 1
                if unroll.terminated[t]:
                    factor = 0.0
                    break
                if unroll.truncated[t]:
                    total += factor * worth(own_left[t], other_left[t])
                    factor = 0.0
                    break
            if factor:
                total += factor * worth(own[t], other[t])
            said = float(own[start][unroll.action[start]])
            wanted = float(td.rescale(torch.tensor(total))) - said
            assert chosen[start - burn_in, b].item() == pytest.approx(said, abs=1e-5)
            assert errors[start - burn_in, b].item() == pytest.approx(wanted, abs=2e-4)


def test_the_loss_is_a_sum_over_sequences_and_no_gradient_reaches_targets_or_burn_in() -> None:
    config = r2d2.Config(burn_in=3, unroll_length=5, finals=3, capacity=99)
    learner, target = network(1), target_of(network(2))
    heard: list[Tensor] = []
    batch = batch_of(config, learner, [unrolled(seed, 9) for seed in range(4)])
    batch.weights[:] = torch.tensor([1.0, 0.5, 0.25, 0.0])
    batch.observation.requires_grad_()
    learn = r2d2.objective(config, target, lambda _, priorities: heard.append(priorities))
    loss = learn(learner, batch)
    errors, _ = r2d2.td_errors(config, learner, target, batch)
    wanted = (0.5 * errors.square().sum(0) * batch.weights).sum()
    torch.testing.assert_close(loss.total, wanted)
    assert loss.weight.item() == 4
    sizes = errors.detach().abs()
    torch.testing.assert_close(heard[0], 0.9 * sizes.amax(0) + 0.1 * sizes.mean(0))
    loss.total.backward()
    assert batch.observation.grad is not None
    # Time 2 is read again as a stacked frame, but the state carries no gradient over.
    assert batch.observation.grad[:3].abs().sum() == 0
    assert batch.observation.grad[:, 3].abs().sum() == 0  # of weight 0
    assert batch.observation.grad[-1].abs().sum() == 0  # there is only a target
    assert all(each.grad is None for each in target.parameters())


@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_first_priorities_are_those_of_learning_with_the_network_that_acted(eta: float) -> None:
    config = r2d2.Config(burn_in=3, unroll_length=8, horizon=3, finals=0, capacity=99, eta=eta)
    learner = network(1)
    for seed in range(5):
        unroll = unrolled(seed, 12, finals=0)
        unroll.first[-1] = unroll.terminated[-1] = True  # so that what comes last is worth nothing
        unroll.outputs["q"][:] = torch.stack(said_of(learner, unroll)[0][:-1]).numpy()
        batch = batch_of(config, learner, [unroll])
        errors, _ = r2d2.td_errors(config, learner, learner, batch)
        wanted = td.sequence_priorities(errors, torch.ones_like(errors, dtype=torch.bool), eta)
        assert r2d2.first_priority(config, unroll) == pytest.approx(wanted.item(), rel=1e-4)


def test_more_cuts_than_there_is_room_for_are_refused() -> None:
    config = r2d2.Config(finals=1)
    unroll = next(
        u for u in (unrolled(s, 61, finals=9) for s in range(20)) if u.truncated.sum() > 1
    )
    with pytest.raises(DataError, match="there is room for 1"):
        items_of(unroll, config.finals)


class Play:
    """Everything a run of R2D2 consists of, on a task of memory with short lives."""

    def __init__(self, seed: int = 0, *, runtime: str = "inline", **settings: Any) -> None:
        config: dict[str, Any] = {
            "burn_in": 2, "unroll_length": 4, "batch_size": 4, "minimum": 6, "capacity": 20,
            "steps": 12, "replay_ratio": 1.5, "target_every": 4,
        }  # fmt: skip
        self.config = r2d2.Config(**{**config, **settings})
        spec = EnvironmentSpec(
            name="cabochon.rl.cue_recall:CueRecall-v0",
            options={"delay": 3},
        )
        key = Key(seed)
        seen = Signature(shape=(4,), dtype="float32", actions=3)
        shape = NetworkConfig(hidden=(6,), lstm=5, previous=True)
        self.network = build(shape, seen, q_head(4), key.fold("network"))
        self.target = target_of(self.network)
        self.replay: Replay = r2d2.new_replay(self.config, self.network)
        self.optimizer = adamw(self.network, OptimizerConfig(weight_decay=0.0))
        self.collector = Collector(
            self.network, spec, epsilon_greedy(epsilons(4)), key,
            acting=ActingConfig(actors=2, environments=2),
            cutting=self.config.cutting,
            runtime=runtime,
        )  # fmt: skip
        self.pace = Pace()
        self.key = key

    def steps(self, start: int = 0) -> Iterator[Step]:
        return r2d2.train(
            self.config, self.network, self.target, self.replay, self.collector,
            self.optimizer, key=self.key, pace=self.pace, start=start,
        )  # fmt: skip

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy({
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "carried": r2d2.carried(self.replay, self.target),
            "collector": self.collector.state(),
        })  # fmt: skip

    def restore(self, saved: dict[str, Any], version: int) -> None:
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, tensor in r2d2.carried(self.replay, self.target).items():
            tensor.copy_(saved["carried"][name])
        self.collector.restore(saved["collector"], version)


def test_what_is_stored_replays_to_what_was_said() -> None:
    """Invariant of stored states: the same weights from the stored state say the same again."""
    play = Play()
    with play.collector:
        unrolls = play.collector.take(12, 0)
    for unroll in unrolls:
        values, _ = said_of(play.network, unroll)
        for t, q in enumerate(values[:-1]):
            np.testing.assert_allclose(q.numpy(), unroll.outputs["q"][t], atol=1e-6)
    assert any(not unroll.begins and unroll.state[0].any() for unroll in unrolls)


@pytest.mark.parametrize("runtime", ["inline", "threads"])
def test_the_ratio_is_exact_and_the_target_follows_the_learning(runtime: str) -> None:
    play, config = Play(runtime=runtime), Play().config
    with play.collector:
        for step in play.steps():
            made = step.index + 1
            due = config.minimum + int(step.index * config.batch_size / config.replay_ratio)
            assert step.report["sequences"] == due
            assert step.report["stored"] == min(due, config.capacity)
            copied = all(
                torch.equal(one, other)
                for one, other in zip(
                    play.network.parameters(), play.target.parameters(), strict=True
                )
            )
            assert copied == (made % config.target_every == 0)
    assert made == config.steps
    assert play.pace.waiting > 0.0
    assert 0.0 < play.pace.starved < 1.0


def test_what_was_learned_from_gets_the_priority_of_its_errors_before_the_update() -> None:
    play = Play(steps=1)
    before, told = copy.deepcopy(play.network), []
    change = play.replay.prioritise
    play.replay.prioritise = lambda numbers, new: (
        told.append((numbers, new)) or change(numbers, new)
    )  # type: ignore[func-returns-value,method-assign]
    with play.collector:
        (_,) = play.steps()
    ((numbers, priorities),) = told
    drawn = play.replay.draw(500, Key(5).numpy())
    batch = SequenceBatch.of(drawn, torch.ones(500))
    errors, _ = r2d2.td_errors(play.config, before, target_of(before), batch)
    wanted = td.sequence_priorities(errors, torch.ones_like(errors, dtype=torch.bool))
    for number, priority in zip(numbers, priorities, strict=True):
        place = int(np.flatnonzero(drawn.numbers == number)[0])
        assert priority == pytest.approx(wanted[place].item(), rel=1e-4)
        mass = play.replay.tree.masses(np.array([number % play.config.capacity]))
        assert mass == pytest.approx(float(priority) ** 0.9, rel=1e-6)


def learned(step: Step) -> Step:
    """Without what is told of the server since this process began."""
    told = {name: value for name, value in step.report.items() if name != "inference_batch"}
    return dataclasses.replace(step, report=told)


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_goes_on_bit_for_bit_with_its_replay_and_its_episodes(stop: int) -> None:
    whole, begun, resumed = Play(), Play(), Play()
    with whole.collector, begun.collector, resumed.collector:
        wanted = list(whole.steps())
        steps = begun.steps()
        found = [next(steps) for _ in range(stop)]
        saved = begun.saved()
        resumed.restore(saved, stop)
        assert resumed.collector.anew == 0
        found += list(resumed.steps(stop))
        assert [learned(step) for step in found] == [learned(step) for step in wanted]
        one, other = whole.saved(), resumed.saved()
    for part in ("network", "carried"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name
    for name, array in one["collector"].items():
        np.testing.assert_array_equal(array, other["collector"][name], err_msg=name)


def test_a_cut_life_is_worth_what_would_have_come() -> None:
    """One observation for ever, 1 a step, cut every 3: the value is 1 / (1 - discount) at least
    nearly; if a cut were an end it would be below 3."""
    config = r2d2.Config(
        burn_in=0, unroll_length=6, batch_size=8, finals=2, capacity=64, minimum=8, discount=0.9,
        horizon=2, steps=400, target_every=10, stored_state=False,
    )  # fmt: skip
    seen = Signature(shape=(1,), dtype="float32", actions=2)
    learner = build(NetworkConfig(hidden=(4,)), seen, q_head(0), Key(3))
    times, over = 7, np.array([False, False, False, True, False, False, True])

    class Endless:
        cutting = config.cutting

        def take(self, count: int, version: int) -> list[Unroll]:
            return [
                Unroll(
                    environment=0, run=0, begins=False,
                    observation=np.ones((times, 1), np.float32),
                    previous_action=np.zeros(times, np.int64), reward=np.ones(times, np.float32),
                    first=over, terminated=over & False, truncated=over,
                    action=np.zeros(times - 1, np.int64),
                    outputs={"q": np.zeros((times - 1, 2), np.float32)},
                    version=np.zeros(times - 1, np.int64), state=(),
                    final_step=np.array([3, 6]), final_observation=np.ones((2, 1), np.float32),
                )
            ] * count  # fmt: skip

        def report(self) -> dict[str, float]:
            return {}

    optimizer = adamw(learner, OptimizerConfig(learning_rate=0.02, weight_decay=0.0))
    for _ in r2d2.train(
        config, learner, target_of(learner), r2d2.new_replay(config, learner), Endless(),  # type: ignore[arg-type]
        optimizer, key=Key(0),
    ):  # fmt: skip
        pass
    with torch.no_grad():
        one = torch.ones(1, 1)
        said, _ = learner(one, torch.zeros(1).long(), torch.ones(1), torch.ones(1).bool(), ())
    assert td.unscale(said["q"][0, 0]).item() == pytest.approx(10.0, rel=0.05)


def test_stored_states_and_burn_in_bring_a_changed_network_back_to_its_state() -> None:
    """How wrong Q is at the first learned step after the weights moved by 2 and 10 percent."""
    seen = Signature(shape=(8,), dtype="float32", actions=4)
    old = build(NetworkConfig(hidden=(32,), lstm=64), seen, q_head(0), Key(0))
    draw = Key(1).generator()
    past, burn, rows = 60, 20, 64
    observation = torch.randn(past + burn + 1, rows, 8, generator=draw)
    still = torch.zeros(past + burn + 1, rows)
    no = still.bool()

    def read(net: AgentNetwork, begin: int, state: tuple[Tensor, ...]) -> Any:
        there = slice(begin, None)
        return net.unroll(observation[there], still[there].long(), still[there], no[there], state)

    def before(net: AgentNetwork, end: int) -> tuple[Tensor, ...]:
        there = slice(0, end)
        return net.unroll(
            observation[there], still[there].long(), still[there], no[there],
            net.initial_state(rows),
        ).state  # fmt: skip

    with torch.no_grad():
        for share in (0.02, 0.1):
            new = target_of(old)
            for each in new.parameters():
                each += share * each.abs().mean() * torch.randn(each.shape, generator=draw)
            truth = read(new, 0, new.initial_state(rows)).outputs["q"][-1]
            zero = new.initial_state(rows)
            ways = {
                "zero": read(new, past + burn, zero),
                "zero, burn-in": read(new, past, zero),
                "stored": read(new, past + burn, before(old, past + burn)),
                "stored, burn-in": read(new, past, before(old, past)),
            }
            wrong = {
                name: ((way.outputs["q"][-1] - truth).norm() / truth.norm()).item()
                for name, way in ways.items()
            }
            assert wrong["zero"] > 5 * wrong["stored"], wrong
            assert wrong["stored"] > 3 * wrong["stored, burn-in"], wrong
            assert wrong["zero"] > 3 * wrong["zero, burn-in"], wrong
            assert wrong["zero, burn-in"] > wrong["stored, burn-in"], wrong


@pytest.mark.parametrize(
    "setting",
    [
        {"burn_in": -1},
        {"unroll_length": 0},
        {"batch_size": 0},
        {"discount": 1.5},
        {"replay_ratio": 0.0},
        {"capacity": 10, "minimum": 50},
        {"eta": -0.1},
        {"importance_exponent": 2.0},
        {"priority_exponent": -1.0},
        {"priority_exponent": float("nan")},
        {"rescaling": -1.0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1.0},
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        r2d2.Config(**setting)
