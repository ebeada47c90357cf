"""One network for all environments: states kept, draws independent of company, logits true."""

import numpy as np
import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import NonFinite
from cabochon.models.agents.networks import NetworkConfig, PolicyAndValue, build
from cabochon.rl.environment import Arrival, EnvironmentSpec, environments
from cabochon.rl.inference import CHUNK, Inference, sample
from cabochon.rl.unrolls import UnrollStore, stack

SPEC = EnvironmentSpec(
    name="small_environments:cabochon-tests/Counting-v0", options={"length": 5, "spread": 4}
)
CONFIG = NetworkConfig(hidden=(8,), lstm=6, previous=True, frame_stack=2)


def served(count=3, length=4, overlap=0, key=0):
    envs = environments(SPEC, range(count), Key(key))
    network = build(CONFIG, envs.signature, PolicyAndValue, Key(key).fold("weights"))
    store = UnrollStore(count, length=length, overlap=overlap)
    return envs, Inference(network, store, sample, Key(key).fold("act"))


def infer(server, arrival):
    """Actions, and the unrolls that were complete before."""
    unrolls = server.receive(arrival)
    return server.answer(arrival), unrolls


def rows_of(arrival, rows):
    """Part of an arrival; no row of it has ended."""
    names = ("ids", "run", "episode", "observation", "reward", "first", "terminated", "truncated")
    return Arrival(**{name: getattr(arrival, name)[rows] for name in names})


@pytest.mark.parametrize("overlap", [0, 3])
def test_what_was_said_in_acting_is_said_again_in_learning(overlap):
    """The state that an unroll carries, at its first step, gives the logits that were stored."""
    envs, server = served(overlap=overlap)
    arrival, unrolls = envs.reset(0), []
    for _ in range(40):
        actions, done = infer(server, arrival)
        unrolls += done
        arrival = envs.step(actions)
    assert len(unrolls) > 15
    batch = stack(unrolls)
    with torch.no_grad():
        again = server.network.unroll(
            batch.observation, batch.previous_action, batch.reward, batch.first, batch.state
        )
    for name, value in batch.outputs.items():
        torch.testing.assert_close(again.outputs[name][:-1], value, atol=1e-5, rtol=1e-5)


def test_a_draw_depends_on_environment_and_step_and_not_on_the_batch():
    envs, together = served(4)
    _, apart = served(4)
    arrival = envs.reset(0)
    for _ in range(4):
        actions, _ = infer(together, arrival)
        split = [infer(apart, rows_of(arrival, rows))[0] for rows in ([2, 0], [3], [1])]
        np.testing.assert_array_equal(actions[[2, 0, 3, 1]], np.concatenate(split))
        arrival = envs.step(actions)


def test_another_run_begins_with_nothing_remembered():
    envs, server = served(2)
    arrival = envs.reset(0)
    for _ in range(6):
        arrival = envs.step(infer(server, arrival)[0])
    other, fresh = served(2)
    anew = other.reset(1)
    first, _ = infer(server, anew)
    np.testing.assert_array_equal(first, infer(fresh, anew)[0])
    for ours, theirs in zip(server.memory, fresh.memory, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_its_state_can_be_saved_at_any_step():
    for steps in (3, CHUNK, CHUNK + 2):
        envs, server = served(2)
        arrival = envs.reset(0)
        for _ in range(steps):
            arrival = envs.step(infer(server, arrival)[0])
        _, other = served(2)
        other.restore(server.state())
        for _ in range(9):
            (actions, one), (again, two) = infer(server, arrival), infer(other, arrival)
            np.testing.assert_array_equal(actions, again)
            assert len(one) == len(two)
            arrival = envs.step(actions)


def test_actions_are_drawn_in_proportion():
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(60_000, 3)
    uniform = np.random.default_rng(0).random((60_000, 2))
    drawn = np.bincount(sample({"logits": logits}, np.zeros(0), uniform), minlength=3) / 60_000
    np.testing.assert_allclose(drawn, logits[0].softmax(-1), atol=0.006)
    edge = np.array([[0.0, 0.0], [np.nextafter(1.0, 0.0), 0.0]])
    certain = torch.tensor([[-1e4, 0.0, -1e4]]).expand(2, 3)
    assert sample({"logits": certain}, np.zeros(0), edge).tolist() == [1, 1]


def test_published_weights_are_used_and_counted():
    envs, server = served()
    weights = {k: torch.zeros_like(v) for k, v in server.network.state_dict().items()}
    server.publish(weights, 7)
    arrival = envs.reset(0)
    for _ in range(5):
        actions, unrolls = infer(server, arrival)
        arrival = envs.step(actions)
    assert (unrolls[0].version == 7).all()
    assert not unrolls[0].outputs["logits"].any()


def test_a_network_that_says_nonsense_is_stopped():
    envs, server = served()
    with torch.no_grad():
        server.network.head.value.bias.fill_(float("nan"))
    with pytest.raises(NonFinite, match="network of version 0"):
        infer(server, envs.reset(0))
