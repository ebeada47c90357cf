"""Unrolls: the steps of one environment that are learned from together, cut from its stream.

A step t of an unroll is an observation, the action and reward *before* it, and what the network
said and which action it chose there. An unroll of length T with an overlap has overlap + T + 1
steps, of which the next one begins with the last overlap + 1: the loss counts the transitions from
steps overlap .. overlap + T - 1, so that each is counted once. Unrolls go on across episodes. One
is complete when its last observation has arrived, before anything is chosen there, so that a
learner may update the weights first.

The recurrent state that an unroll carries is the one from before its step 0, caught when that step
was taken, so that whatever is run over the overlap (a burn-in) begins where the actor was.

Source: Espeholt et al. 2020 (SEED RL), arXiv:1910.06591, and its published code. Differs: that code
keeps the state from before step `overlap` and begins the first unroll with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError
from cabochon.models.agents.networks import Finals, State
from cabochon.rl.environment import Arrival

__all__ = ["Unroll", "UnrollBatch", "UnrollStore", "stack"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Unroll:
    """Steps of one environment: N = overlap + T + 1 observations, and an action between each."""

    environment: int
    run: int
    begins: bool
    """It is the first of its run: no transition of its overlap was counted before."""
    observation: Array
    """N ...."""
    previous_action: Array
    """N int64: the action that led here; anything at the very beginning."""
    reward: Array
    """N float32: what that action brought."""
    first: Array
    """N bool: the observation begins an episode."""
    terminated: Array
    """N bool: the action that led here ended its episode."""
    truncated: Array
    """N bool: the episode was cut short there; see `final_observation`."""
    action: Array
    """N-1 int64: chosen here."""
    outputs: Mapping[str, Array]
    """N-1 ...: what the network said here (logits, value, q)."""
    version: Array
    """N-1 int64: of the weights that said so."""
    state: tuple[Array, ...]
    """... each: from before step 0."""
    final_step: Array
    """m int64: the steps, 1 or later, at which `truncated` is True."""
    final_observation: Array
    """m ...: the last observations of the episodes that were cut short there."""


@dataclass(frozen=True, kw_only=True)
class UnrollBatch:
    """B unrolls, time-major."""

    observation: Tensor
    """N B ...."""
    previous_action: Tensor
    """N B, as the next four."""
    reward: Tensor
    first: Tensor
    terminated: Tensor
    truncated: Tensor
    action: Tensor
    """N-1 B."""
    version: Tensor
    """N-1 B."""
    begins: Tensor
    """B bool."""
    outputs: Mapping[str, Tensor]
    """N-1 B ...."""
    state: State
    """B ... each."""
    finals: Finals

    def to(self, device: torch.device | str) -> UnrollBatch:
        """The same on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
        moved["outputs"] = {name: value.to(device) for name, value in self.outputs.items()}
        moved["state"] = tuple(each.to(device) for each in self.state)
        moved["finals"] = Finals(*(each.to(device) for each in self.finals))
        return UnrollBatch(**moved)


SEEN = ("observation", "previous_action", "reward", "first", "terminated", "truncated")
"""Columns of what arrives: of every step."""
CHOSEN = ("action", "version")
"""Columns of what is chosen, beside the outputs: of every step but the last."""


def stack(unrolls: Sequence[Unroll]) -> UnrollBatch:
    """One batch of unrolls of the same length.

    Raises:
        DataError: there is none, or their lengths differ.
    """
    if len({len(each.action) for each in unrolls}) != 1:
        raise DataError(f"unrolls of one length are needed, got {[len(u.action) for u in unrolls]}")
    columns = {
        name: torch.from_numpy(np.stack([getattr(each, name) for each in unrolls], 1))
        for name in (*SEEN, *CHOSEN)
    }
    rows = np.repeat(np.arange(len(unrolls)), [len(each.final_step) for each in unrolls])
    finals = Finals(
        torch.from_numpy(np.concatenate([each.final_step for each in unrolls])),
        torch.from_numpy(rows),
        torch.from_numpy(np.concatenate([each.final_observation for each in unrolls])),
    )
    outputs = {
        name: torch.from_numpy(np.stack([each.outputs[name] for each in unrolls], 1))
        for name in unrolls[0].outputs
    }
    state = tuple(
        torch.from_numpy(np.stack(parts))
        for parts in zip(*(each.state for each in unrolls), strict=True)
    )
    begins = torch.tensor([each.begins for each in unrolls])
    return UnrollBatch(**columns, outputs=outputs, state=state, finals=finals, begins=begins)


class UnrollStore:
    """The unrolls under way of `environments` environments."""

    def __init__(self, environments: int, *, length: int, overlap: int = 0) -> None:
        """Empty.

        Args:
            environments: their numbers are 0 to environments - 1.
            length: T, transitions of an unroll that are its own.
            overlap: steps that come before them again (a burn-in).
        """
        if environments < 1 or length < 1 or overlap < 0:
            raise ConfigError(
                "an unroll store needs environments and length of at least 1 and no negative "
                f"overlap, got {environments}, {length} and {overlap}"
            )
        self.environments, self.length, self.overlap = environments, length, overlap
        self.steps = overlap + length + 1
        self.cursor = np.zeros(environments, np.int64)
        self.run = np.full(environments, -1, np.int64)
        self.begins = np.ones(environments, bool)
        self.columns: dict[str, Array] = {}
        """Name, with "outputs." before an output's, -> environments x steps x ...."""
        self.states: list[Array] = []
        """environments x slots x ...: slot i is from before step i * length, which is step 0 of the
        unroll that comes i after the present one."""
        self.finals: list[dict[int, Array]] = [{} for _ in range(environments)]
        self.previous = np.zeros(environments, np.int64)

    def drop(self, environment: int, run: int) -> None:
        """Forgets what is under way: the environment was begun anew, as `run`."""
        self.cursor[environment], self.run[environment] = 0, run
        self.begins[environment] = True
        self.finals[environment] = {}
        self.previous[environment] = 0

    def arrive(self, arrival: Arrival, state: Sequence[Array]) -> list[Unroll]:
        """One more observation of each environment that arrived, and the unrolls it completed.

        Args:
            arrival: n environments, each once; one whose run is new loses what was under way.
            state: n ... each, from before this step (not yet zeroed where an episode begins).

        Raises:
            DataError: an environment arrives twice, or is none of the store's.
        """
        ids = arrival.ids
        if len(np.unique(ids)) != len(ids):
            raise DataError(f"environments arrived twice in one batch: {ids.tolist()}")
        if ((ids < 0) | (ids >= self.environments)).any():
            raise DataError(f"environments {ids.tolist()} arrived; there are {self.environments}")
        for place in np.flatnonzero(self.run[ids] != arrival.run).tolist():
            self.drop(int(ids[place]), int(arrival.run[place]))
        at = self.cursor[ids]
        for name in SEEN:
            value = self.previous[ids] if name == "previous_action" else getattr(arrival, name)
            self._column(name, value)[ids, at] = value
        for place in np.flatnonzero(arrival.truncated[arrival.ended]).tolist():
            each = int(arrival.ended[place])
            if at[each] > 0:
                self.finals[ids[each]][int(at[each])] = arrival.final_observation[place]
        self._catch(ids, at, state)
        self.cursor[ids] += 1
        return [self._completed(each) for each in ids[at == self.steps - 1].tolist()]

    def choose(
        self, ids: Array, actions: Array, outputs: Mapping[str, Array], version: int
    ) -> None:
        """What was chosen at the observations that arrived last.

        Args:
            ids: n int64, the environments.
            actions: n int64.
            outputs: n ... each, what the network said.
            version: of its weights.
        """
        at = self.cursor[ids] - 1
        chosen = {"action": actions, "version": np.full(len(ids), version, np.int64)}
        chosen |= {f"outputs.{name}": value for name, value in outputs.items()}
        for name, value in chosen.items():
            self._column(name, value)[ids, at] = value
        self.previous[ids] = actions

    def state(self) -> dict[str, Array]:
        """Everything under way, as arrays, for `restore`."""
        finals = [(e, t, seen) for e, own in enumerate(self.finals) for t, seen in own.items()]
        saved = {
            "cursor": self.cursor,
            "run": self.run,
            "begins": self.begins,
            "previous": self.previous,
            "final_places": np.array([(e, t) for e, t, _ in finals], np.int64).reshape(-1, 2),
            **{f"column.{name}": column for name, column in self.columns.items()},
            **{f"state.{part}": slots for part, slots in enumerate(self.states)},
        }
        if finals:
            saved["finals"] = np.stack([seen for _, _, seen in finals])
        return {name: value.copy() for name, value in saved.items()}

    def restore(self, saved: Mapping[str, Array]) -> None:
        """What `state` gave, again."""
        self.cursor, self.run = saved["cursor"].copy(), saved["run"].copy()
        self.begins, self.previous = saved["begins"].copy(), saved["previous"].copy()
        self.columns = {
            name.removeprefix("column."): value.copy()
            for name, value in saved.items()
            if name.startswith("column.")
        }
        parts = sum(name.startswith("state.") for name in saved)
        self.states = [saved[f"state.{part}"].copy() for part in range(parts)]
        self.finals = [{} for _ in range(self.environments)]
        for place, (environment, time) in enumerate(saved["final_places"].tolist()):
            self.finals[environment][time] = saved["finals"][place]

    def _column(self, name: str, like: Array) -> Array:
        if name not in self.columns:
            shape = (self.environments, self.steps, *like.shape[1:])
            self.columns[name] = np.zeros(shape, like.dtype)
        return self.columns[name]

    def _catch(self, ids: Array, at: Array, state: Sequence[Array]) -> None:
        if not self.states:
            slots = (self.overlap + self.length) // self.length + 1
            self.states = [
                np.zeros((self.environments, slots, *part.shape[1:]), part.dtype) for part in state
            ]
        here = at % self.length == 0
        for slots_of, part in zip(self.states, state, strict=True):
            slots_of[ids[here], at[here] // self.length] = part[here]

    def _completed(self, environment: int) -> Unroll:
        column = {name: value[environment].copy() for name, value in self.columns.items()}
        kept = sorted(self.finals[environment].items())
        like = column["observation"]
        unroll = Unroll(
            environment=environment,
            run=int(self.run[environment]),
            begins=bool(self.begins[environment]),
            **{name: column[name] for name in SEEN},
            **{name: column[name][:-1] for name in CHOSEN},
            outputs={
                name.removeprefix("outputs."): value[:-1]
                for name, value in column.items()
                if name.startswith("outputs.")
            },
            state=tuple(slots[environment, 0].copy() for slots in self.states),
            final_step=np.array([time for time, _ in kept], np.int64),
            final_observation=np.array([seen for _, seen in kept], like.dtype).reshape(
                -1, *like.shape[1:]
            ),
        )
        for value in self.columns.values():
            value[environment, : self.overlap + 1] = value[environment, self.length :]
        for slots in self.states:
            slots[environment, :-1] = slots[environment, 1:].copy()
        moved = ((time - self.length, seen) for time, seen in kept)
        # That of the next unroll's step 0 belongs to a transition before it.
        self.finals[environment] = {time: seen for time, seen in moved if time > 0}
        self.cursor[environment] = self.overlap + 1
        self.begins[environment] = False
        return unroll
