"""Unrolls as a recurrent replay keeps them: arrays of one shape, and batches of them, time first.

An unroll begins with `burn_in` steps that are read to bring its stored state up to date and not
learned. At time t stand the observation and what led to it: the action, its reward, and whether it
ended an episode. Where an episode was cut short, its last observation is kept beside the sequence.

Source: Kapturowski et al. 2019 (R2D2), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.models.agents.networks import AgentNetwork, Finals, State, Unrolled
from cabochon.rl.replay import Drawn, Spec
from cabochon.rl.unrolls import Unroll

__all__ = ["SequenceBatch", "items_of", "spec_of"]

Array = NDArray[Any]

_STEPS = ("observation", "previous_action", "reward", "first", "terminated", "truncated")


def spec_of(network: AgentNetwork, times: int, finals: int) -> Spec:
    """The fields of a sequence in a replay.

    Args:
        network: says what is seen and remembered.
        times: observations of a sequence.
        finals: how many episodes may be cut short within it.
    """
    shape, seen = network.signature.shape, np.dtype(network.signature.dtype)
    spec: dict[str, Any] = {
        "observation": ((times, *shape), seen),
        "previous_action": ((times,), np.int64),
        "reward": ((times,), np.float32),
        "first": ((times,), np.bool_),
        "terminated": ((times,), np.bool_),
        "truncated": ((times,), np.bool_),
        "final_time": ((finals,), np.int64),
        "final_observation": ((finals, *shape), seen),
    }
    for number, part in enumerate(network.initial_state(1)):
        spec[f"state.{number}"] = (tuple(part.shape[1:]), part.numpy(force=True).dtype)
    return spec


def items_of(unroll: Unroll, finals: int) -> dict[str, Array]:
    """One unroll as a replay keeps it: every field with an axis of one before it.

    Raises:
        DataError: more than `finals` episodes were cut short within it.
    """
    cut = len(unroll.final_step)
    if cut > finals:
        raise DataError(
            f"{cut} episodes of environment {unroll.environment} were cut short within "
            f"{len(unroll.first)} steps; there is room for {finals}: raise finals, or cut later"
        )
    time = np.zeros(finals, np.int64)  # 0 is no place: its action would lie before the sequence
    last = np.zeros((finals, *unroll.observation.shape[1:]), unroll.observation.dtype)
    time[:cut], last[:cut] = unroll.final_step, unroll.final_observation
    items = {name: getattr(unroll, name) for name in _STEPS}
    items |= {f"state.{number}": part for number, part in enumerate(unroll.state)}
    items |= {"final_time": time, "final_observation": last}
    return {name: np.asarray(value)[None] for name, value in items.items()}


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Sequences to learn from; T + 1 observations, T actions."""

    observation: Tensor
    """T+1 B ...."""
    previous_action: Tensor
    """T+1 B int64."""
    reward: Tensor
    """T+1 B float32."""
    first: Tensor
    """T+1 B bool."""
    terminated: Tensor
    """T+1 B bool."""
    truncated: Tensor
    """T+1 B bool."""
    state: State
    """Each B ...: before time 0."""
    finals: Finals
    """Of the episodes that were cut short."""
    weights: Tensor
    """B float32: importance of each sequence."""
    numbers: Array
    """B: what the replay calls them."""

    @staticmethod
    def of(drawn: Drawn, weights: Tensor, device: torch.device | str = "cpu") -> SequenceBatch:
        """What was drawn from a replay, on `device`."""
        items = {name: torch.from_numpy(value) for name, value in drawn.items.items()}
        parts = sum(name.startswith("state.") for name in items)
        row, slot = items["final_time"].nonzero(as_tuple=True)
        return SequenceBatch(
            **{name: items[name].transpose(0, 1).to(device) for name in _STEPS},
            state=tuple(items[f"state.{number}"].to(device) for number in range(parts)),
            finals=Finals(
                items["final_time"][row, slot].to(device),
                row.to(device),
                items["final_observation"][row, slot].to(device),
            ),
            weights=weights.float().to(device),
            numbers=drawn.numbers,
        )

    def read(self, network: AgentNetwork, begin: int, end: int, state: State) -> Unrolled:
        """What `network` says of times `begin` to `end` (exclusive), where `state` is before them.

        Of the episodes cut short those count whose last action lies there as well.
        """
        times, chosen = slice(begin, end), self._cut_within(begin, end)
        time, row, observation = (each[chosen] for each in self.finals)
        return network.unroll(
            self.observation[times],
            self.previous_action[times],
            self.reward[times],
            self.first[times],
            state,
            Finals(time - begin, row, observation),
        )

    def place_finals(self, values: Tensor, begin: int) -> Tensor:
        """T-begin B: `values` (n) of the finals that `read` found from `begin` to the last time.

        Each stands at the time of the action after which its episode was cut short; 0 elsewhere.
        """
        chosen = self._cut_within(begin, len(self.first))
        found = values.new_zeros(len(self.first) - 1 - begin, self.first.shape[1])
        found[self.finals.time[chosen] - begin - 1, self.finals.row[chosen]] = values
        return found

    def _cut_within(self, begin: int, end: int) -> Tensor:
        return (self.finals.time > begin) & (self.finals.time < end)
