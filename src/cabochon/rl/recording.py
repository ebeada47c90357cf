"""Episodes that agents play, recorded as RLDS while they learn.

The server shows what arrives and what was chosen (`Server`'s `observe`); an episode is written when
it ends. One whose beginning was not seen (the run went on from a checkpoint in the middle of it) or
whose actor died is not written; what is recorded already is not recorded again. Where a run that
goes on plays other episodes than before, as without `inline`, they get names of their own.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.data.rlds.layout import is_dataset
from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.records import episode_of
from cabochon.data.rlds.writer import EpisodeWriter
from cabochon.rl.environment import Arrival, EnvironmentSpec

__all__ = ["AgentRecorder"]

Array = NDArray[Any]


@dataclass
class _Under:
    """An episode under way."""

    run: int
    number: int
    """Within the run, as the environment counts."""
    observations: list[Array] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class AgentRecorder:
    """Called with every batch. A context manager; leaving it closes the dataset."""

    def __init__(self, folder: Path, spec: EnvironmentSpec) -> None:
        """Goes on where a dataset is there already."""
        self.spec = spec
        there = is_dataset(folder)
        self.writer = EpisodeWriter(folder, append=there)
        self.recorded: dict[str, str] = {}
        if there:
            self.recorded = {
                _text(each.metadata["episode_id"]): _digest(
                    each.steps["action"][:-1], each.steps["reward"][:-1]
                )
                for each in Episodes(folder)
            }
        self.under: dict[int, _Under] = {}

    def __call__(self, arrival: Arrival, actions: Array) -> None:
        """One batch that arrived, and what was chosen for it."""
        ended = {row: place for place, row in enumerate(arrival.ended.tolist())}
        for row, number in enumerate(arrival.ids.tolist()):
            run = int(arrival.run[row])
            own = self.under.get(number)
            if own is not None and own.run != run:
                own = None  # its actor died in the middle of it
            if own is not None:
                own.rewards.append(float(arrival.reward[row]))
                if row in ended:
                    own.observations.append(arrival.final_observation[ended[row]])
                    self._write(number, own, terminated=bool(arrival.terminated[row]))
            if arrival.first[row]:
                own = _Under(run, int(arrival.episode[row]))
            if own is None:
                self.under.pop(number, None)
                continue
            own.observations.append(arrival.observation[row].copy())
            own.actions.append(int(actions[row]))
            self.under[number] = own

    def __enter__(self) -> AgentRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def _write(self, number: int, own: _Under, *, terminated: bool) -> None:
        actions, rewards = np.array(own.actions, np.int64), np.array(own.rewards, np.float32)
        plain, said = f"{number}-{own.run}-{own.number}", _digest(actions, rewards)
        names = (f"{plain}-again_{count}" if count else plain for count in itertools.count())
        name = next(each for each in names if self.recorded.get(each, said) == said)
        if name in self.recorded:
            return
        self.recorded[name] = said
        self.writer.write(
            episode_of(
                observations=np.stack(own.observations),
                actions=actions,
                rewards=rewards,
                terminated=terminated,
                metadata={"episode_id": name, "environment_config": self.spec.name},
            )
        )


def _digest(actions: Array, rewards: Array) -> str:
    """Tells episodes of one name apart."""
    read = actions.astype(np.int64).tobytes() + rewards.astype(np.float32).tobytes()
    return hashlib.blake2b(read, digest_size=8).hexdigest()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
