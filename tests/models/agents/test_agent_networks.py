"""Unrolls are steps one after the other; beginnings forget; final observations go on."""

import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import (
    Finals,
    NetworkConfig,
    PolicyAndValue,
    Signature,
    build,
    policy_and_value,
)
from cabochon.models.agents.recurrent import Frames

VECTOR = Signature(shape=(4,), dtype="float32", actions=3)
PICTURE = Signature(shape=(36, 36), dtype="uint8", actions=3)

CASES = [
    (NetworkConfig(hidden=(8,)), VECTOR),
    (NetworkConfig(hidden=()), VECTOR),
    (NetworkConfig(hidden=(8,), lstm=5, previous=True, frame_stack=3), VECTOR),
    (NetworkConfig(lstm=5, frame_stack=2, features=16, previous=True), PICTURE),
    (NetworkConfig(torso="impala_deep", features=16, frame_stack=2), PICTURE),
]


def inputs(signature, length=7, rows=3):
    draw = torch.Generator().manual_seed(1)
    shape = (length, rows, *signature.shape)
    if signature.dtype == "uint8":
        observation = torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
    else:
        observation = torch.randn(shape, generator=draw)
    return {
        "observation": observation,
        "previous_action": torch.randint(0, signature.actions, (length, rows), generator=draw),
        "reward": torch.randn(length, rows, generator=draw),
        "first": torch.rand(length, rows, generator=draw) < 0.3,
    }


@pytest.mark.parametrize(("config", "signature"), CASES)
def test_an_unroll_is_its_steps_one_after_the_other(config, signature):
    network = build(config, signature, PolicyAndValue, Key(0))
    given, state = inputs(signature), network.initial_state(3)
    whole = network.unroll(**given, state=state)
    for t in range(7):
        outputs, state = network(**{k: v[t] for k, v in given.items()}, state=state)
        for name, value in outputs.items():
            torch.testing.assert_close(whole.outputs[name][t], value)
    for ours, theirs in zip(whole.state, state, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("config", "signature"), CASES)
def test_nothing_before_a_beginning_is_remembered(config, signature):
    network = build(config, signature, PolicyAndValue, Key(0))
    given = inputs(signature)
    given["first"][3] = True
    whole = network.unroll(**given, state=network.initial_state(3))
    late = {k: v[3:] for k, v in given.items()}
    late["previous_action"][0], late["reward"][0] = 2, 9.0  # of the episode before: not shown
    alone = network.unroll(**late, state=network.initial_state(3))
    torch.testing.assert_close(whole.outputs["logits"][3:], alone.outputs["logits"])


@pytest.mark.parametrize(("config", "signature"), CASES)
def test_a_final_observation_is_valued_as_if_the_episode_went_on(config, signature):
    network = build(config, signature, PolicyAndValue, Key(0))
    given = inputs(signature)
    given["first"][:] = False
    cut = {k: v.clone() for k, v in given.items()}
    cut["first"][4, 1] = True  # row 1's episode is cut short; its last observation is this:
    final = given["observation"][4, 1]
    cut["observation"][4, 1] = given["observation"][0, 0]
    finals = Finals(torch.tensor([4]), torch.tensor([1]), final[None])
    state = network.initial_state(3)
    went_on = network.unroll(**given, state=state).outputs["value"][4, 1]
    unrolled = network.unroll(**cut, state=state, finals=finals)
    torch.testing.assert_close(unrolled.finals["value"], went_on[None])
    plain = network.unroll(**cut, state=state)
    torch.testing.assert_close(unrolled.outputs["value"], plain.outputs["value"])


def test_frames_are_stacked_as_a_loop_would():
    draw = torch.Generator().manual_seed(0)
    seen = torch.rand(9, 4, 2, generator=draw)
    first = torch.rand(9, 4, generator=draw) < 0.3
    state = torch.rand(4, 2, 2, generator=draw)
    frames = Frames.of(seen, first, state)
    stacked, after = frames.stacked(), frames.state()
    for b in range(4):
        past = list(state[b])
        for t in range(9):
            if first[t, b]:
                past = [torch.zeros(2), torch.zeros(2)]
            torch.testing.assert_close(stacked[t, b], torch.stack([*past, seen[t, b]]))
            past = [past[1], seen[t, b]]
        torch.testing.assert_close(after[b], torch.stack(past))


def test_one_of_several_kinds_is_seen_as_one_hot():
    kinds = Signature(shape=(), dtype="int64", actions=2, kinds=5)
    network = build(NetworkConfig(hidden=(4,)), kinds, PolicyAndValue, Key(0))
    outputs, _ = network(
        torch.tensor([0, 4]), torch.zeros(2).long(), torch.zeros(2), torch.ones(2).bool(), ()
    )
    assert outputs["logits"].shape == (2, 2)


def test_colours_last_or_first_is_the_same_picture():
    last = Signature(shape=(36, 36, 3), dtype="uint8", actions=2)
    first = Signature(shape=(3, 36, 36), dtype="uint8", actions=2)
    config = NetworkConfig(frame_stack=2, features=8)
    one, two = (build(config, each, PolicyAndValue, Key(0)) for each in (last, first))
    seen = inputs(last)["observation"]
    rest = {k: v for k, v in inputs(last).items() if k != "observation"}
    a = one.unroll(observation=seen, **rest, state=one.initial_state(3))
    b = two.unroll(observation=seen.movedim(-1, 2), **rest, state=two.initial_state(3))
    torch.testing.assert_close(a.outputs["logits"], b.outputs["logits"])


def test_first_weights_depend_on_the_key_alone():
    torch.manual_seed(5)
    one = build(NetworkConfig(), VECTOR, PolicyAndValue, Key(3))
    torch.manual_seed(6)
    two = build(NetworkConfig(), VECTOR, PolicyAndValue, Key(3))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name])


def test_shapes_that_make_no_network_are_refused():
    with pytest.raises(ConfigError, match="too small"):
        build(NetworkConfig(), Signature(shape=(5, 5), dtype="uint8", actions=2), PolicyAndValue,
              Key(0))  # fmt: skip
    with pytest.raises(ConfigError, match="take mlp"):
        build(NetworkConfig(torso="nature"), VECTOR, PolicyAndValue, Key(0))
    with pytest.raises(ConfigError, match="frame_stack"):
        NetworkConfig(frame_stack=0)


def test_policy_and_value_may_share_nothing():
    network = build(NetworkConfig(hidden=()), VECTOR, policy_and_value((8, 8)), Key(0))
    given = inputs(VECTOR)
    network.unroll(**given, state=()).outputs["value"].sum().backward()
    touched = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None}
    assert touched == {"value"}
