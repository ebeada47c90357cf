"""Central inference: one network answers every environment, a batch at a time.

For each environment the server keeps its recurrent state and the action before; actors keep nothing
of either. What was seen, said and chosen goes into the unrolls. An environment's random numbers
depend on its own number, run and step alone, never on who shares a batch with it.

Source: Espeholt et al. 2020 (SEED RL), arXiv:1910.06591. Differs: an unroll is complete before the
network is asked about its last observation, not after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cabochon.core import Key
from cabochon.core.errors import NonFinite
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.environment import Arrival
from cabochon.rl.unrolls import Unroll, UnrollStore

__all__ = ["CHUNK", "Choose", "Inference", "sample"]

Array = NDArray[Any]

Choose = Callable[[Mapping[str, Tensor], Array, Array], Array]
"""(outputs n ..., environments n, uniform numbers n 2 in [0, 1)) -> actions n int64."""

CHUNK = 256
"""Steps whose uniform numbers are drawn at once."""


def sample(outputs: Mapping[str, Tensor], _environments: Array, uniform: Array) -> Array:
    """Actions drawn from the softmax of `logits`, by the inverse of its cumulative sum."""
    cumulative = outputs["logits"].double().softmax(-1).cumsum(-1).cpu().numpy()
    below = cumulative <= uniform[:, :1] * cumulative[:, -1:]
    actions: Array = np.minimum(below.sum(-1), cumulative.shape[-1] - 1).astype(np.int64)
    return actions


class Inference:
    """The server's state; one thread at a time calls `receive` and `answer`, any `publish`."""

    def __init__(
        self,
        network: AgentNetwork,
        store: UnrollStore,
        choose: Choose,
        key: Key,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Nothing was seen yet; the weights are of version 0.

        Args:
            network: read when asked; on `device`. Where the learner changes it in another thread it
                is a copy, and `publish` brings the changes.
            store: gets every step.
            choose: the actions.
            key: of what is drawn.
            device: of the network.
        """
        self.network, self.store, self.choose, self.key = network, store, choose, key
        self.device = torch.device(device)
        count = store.environments
        self.memory = list(network.initial_state(count, self.device))
        self.run = np.full(count, -1, np.int64)
        self.previous = np.zeros(count, np.int64)
        self.steps = np.zeros(count, np.int64)
        self.uniform = np.zeros((count, CHUNK, 2))
        self.version = 0
        self.weights_lock = threading.Lock()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Newer weights for the network, between two batches."""
        own = self.network.state_dict()
        with self.weights_lock, torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
            self.version = version

    def receive(self, arrival: Arrival) -> list[Unroll]:
        """Environments that arrived wait for an action from now on; the unrolls they completed.

        Raises:
            DataError: an environment arrives twice in a batch.
        """
        ids = arrival.ids
        anew = self.run[ids] != arrival.run
        self._forget(ids[anew], arrival.run[anew])
        rows = self._rows(ids)
        return self.store.arrive(arrival, [part[rows].cpu().numpy() for part in self.memory])

    def answer(self, arrival: Arrival) -> Array:
        """An action for every environment that was received, n int64.

        Raises:
            NonFinite: the network says something that is not finite.
        """
        ids = arrival.ids
        rows = self._rows(ids)
        with self.weights_lock, torch.inference_mode():
            version = self.version
            outputs, after = self.network(
                torch.from_numpy(arrival.observation).to(self.device),
                torch.from_numpy(self.previous[ids]).to(self.device),
                torch.from_numpy(arrival.reward).to(self.device),
                torch.from_numpy(arrival.first).to(self.device),
                tuple(part[rows] for part in self.memory),
            )
        said = {name: value.float().cpu().numpy() for name, value in outputs.items()}
        if not all(np.isfinite(value).all() for value in said.values()):
            raise NonFinite(f"the network of version {version} says {said} of what it sees")
        actions = self.choose(outputs, ids, self._uniform(ids))
        self.store.choose(ids, actions, said, version)
        for part, new in zip(self.memory, after, strict=True):
            part[rows] = new
        self.previous[ids] = actions
        self.steps[ids] += 1
        return actions

    def state(self) -> dict[str, Array]:
        """Everything but the weights, as arrays, for `restore`."""
        return {
            "run": self.run.copy(),
            "previous": self.previous.copy(),
            "steps": self.steps.copy(),
            **{f"memory.{i}": part.cpu().numpy().copy() for i, part in enumerate(self.memory)},
            **{f"store.{name}": value for name, value in self.store.state().items()},
        }

    def restore(self, saved: Mapping[str, Array]) -> None:
        """What `state` gave, again."""
        self.run, self.previous = saved["run"].copy(), saved["previous"].copy()
        self.steps = saved["steps"].copy()
        for i, part in enumerate(self.memory):
            part.copy_(torch.from_numpy(saved[f"memory.{i}"].copy()))
        for each in np.flatnonzero(self.steps % CHUNK).tolist():
            self._draw(each)
        self.store.restore(
            {k.removeprefix("store."): v for k, v in saved.items() if k.startswith("store.")}
        )

    def _rows(self, ids: Array) -> slice | Tensor:
        """Where these environments' memory is: a slice, that copies nothing, if there is one."""
        if (np.diff(ids) == 1).all():
            return slice(int(ids[0]), int(ids[-1]) + 1)
        return torch.from_numpy(ids).to(self.device)

    def _forget(self, ids: Array, run: Array) -> None:
        """These environments were begun anew by another actor."""
        if len(ids):
            self.run[ids], self.previous[ids], self.steps[ids] = run, 0, 0
            rows = torch.from_numpy(ids).to(self.device)
            for part in self.memory:
                part[rows] = 0

    def _uniform(self, ids: Array) -> Array:
        at = self.steps[ids] % CHUNK
        for each in ids[at == 0].tolist():
            self._draw(each)
        return self.uniform[ids, at]

    def _draw(self, environment: int) -> None:
        chunk = int(self.steps[environment]) // CHUNK
        run = int(self.run[environment])
        stream = self.key.fold("action", environment, run, chunk).numpy()
        self.uniform[environment] = stream.random((CHUNK, 2))
