"""Q heads: the dueling identity, and a network that judges a sequence as it judges its steps."""

from __future__ import annotations

import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import ConfigError
from cabochon.models.agents.networks import NetworkConfig, Signature, build
from cabochon.models.agents.q_network import ActionValues, DuelingValues, q_head


def test_advantages_have_no_mean_so_that_the_mean_of_q_is_the_value() -> None:
    head = DuelingValues(5, 4, 8)
    features = torch.randn(7, 5)
    q = head(features)["q"]
    value = head.value(torch.relu(head.value_hidden(features)))
    torch.testing.assert_close(q.mean(-1, keepdim=True), value)
    assert head.advantage.bias is None
    shifted = DuelingValues(5, 4, 8)
    shifted.load_state_dict(head.state_dict())
    with torch.no_grad():  # the same amount more for every action is no advantage
        shifted.advantage.weight += torch.randn(1, 8)
    torch.testing.assert_close(shifted(features)["q"], q)


def test_the_width_decides_which_head() -> None:
    assert isinstance(q_head(0)(3, 2), ActionValues)
    head = q_head(16)(3, 2)
    assert isinstance(head, DuelingValues)
    assert head.value_hidden.out_features == 16
    with pytest.raises(ConfigError, match="0 or more"):
        q_head(-1)


@pytest.mark.parametrize("lstm", [0, 6])
def test_a_sequence_is_judged_as_its_steps_are(lstm: int) -> None:
    seen = Signature(shape=(3,), dtype="float32", actions=4)
    config = NetworkConfig(hidden=(8,), lstm=lstm, frame_stack=2, previous=True)
    network = build(config, seen, q_head(5), Key(0))
    time, rows = 9, 3
    observation, reward = torch.randn(time, rows, 3), torch.randn(time, rows)
    action, first = torch.randint(4, (time, rows)), torch.rand(time, rows) < 0.3
    state = network.initial_state(rows)
    whole = network.unroll(observation, action, reward, first, state)
    for t in range(time):
        said, state = network(observation[t], action[t], reward[t], first[t], state)
        torch.testing.assert_close(said["q"], whole.outputs["q"][t])
    for one, other in zip(state, whole.state, strict=True):
        torch.testing.assert_close(one, other)
