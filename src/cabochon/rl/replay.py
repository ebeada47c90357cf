"""A replay of sequences that surprise more are drawn more often from; the oldest make room.

P(i) = p_i^a / sum_j p_j^a over what is stored, where p is a priority. The sums are kept in a tree,
so that a draw and a change each take log(capacity) additions; inner sums are always computed from
their two children, never by adding differences, so that no rounding error grows.

Everything that a replay remembers lies in arrays, which a checkpoint can hold.

Source: Schaul et al. 2016, arXiv:1511.05952, section 3.3 and appendix B.2.1 (sum tree); the
exponent and the ratio of Espeholt et al. 2020, arXiv:1910.06591 (SEED RL).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from cabochon.core.errors import ConfigError, DataError, NonFinite

__all__ = ["Drawn", "Pace", "Replay", "SumTree", "inserts_before", "replay_bytes"]

Spec = Mapping[str, tuple[tuple[int, ...], DTypeLike]]
"""Field of an item -> its shape and type."""


class SumTree:
    """Masses of `size` leaves and their partial sums: a heap, whose node 1 is the sum of all.

    The children of node i are 2 i and 2 i + 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a sum tree needs at least 1 leaf, got {size}")
        self.size = size
        self.first = 1 << (size - 1).bit_length()  # the leaves' place in the heap
        self.nodes: NDArray[np.float64] = np.zeros(2 * self.first)

    @property
    def total(self) -> float:
        """The sum of all masses."""
        return float(self.nodes[1])

    def masses(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """n: of the given leaves."""
        found: NDArray[np.float64] = self.nodes[self.first + leaves]
        return found

    def put(self, leaves: NDArray[np.int64], masses: NDArray[np.float64]) -> None:
        """Gives each of `leaves` (n) its mass (n), which is finite and at least 0.

        Raises:
            NonFinite: a mass is not; nothing was changed.
        """
        if not (np.isfinite(masses).all() and (masses >= 0.0).all()):
            wrong = masses[~(np.isfinite(masses) & (masses >= 0.0))][0]
            raise NonFinite(f"priorities must be finite and at least 0, got a mass of {wrong}")
        nodes = self.first + leaves
        self.nodes[nodes] = masses
        while (nodes := np.unique(nodes >> 1))[0] > 0:
            self.nodes[nodes] = self.nodes[2 * nodes] + self.nodes[2 * nodes + 1]

    def find(self, places: NDArray[np.float64]) -> NDArray[np.int64]:
        """n: the leaf in whose mass each of `places` (n, in [0, total)) lies; none of mass 0."""
        nodes = np.ones(len(places), dtype=np.int64)
        left = places.astype(np.float64)
        for _ in range(self.first.bit_length() - 1):
            before = self.nodes[2 * nodes]
            # Rounding may carry a place beyond the last mass: an empty branch is never entered.
            right = (left >= before) & (self.nodes[2 * nodes + 1] > 0.0)
            left = np.where(right, left - before, left)
            nodes = 2 * nodes + right
        return nodes - self.first


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Items that were drawn from a replay."""

    numbers: NDArray[np.int64]
    """B: which item it is, counted from 0 since the replay began; never given twice."""
    probabilities: NDArray[np.float64]
    """B: with which it was drawn."""
    stored: int
    """How many items there were to draw from."""
    items: Mapping[str, NDArray[Any]]
    """B ...: copies of what is stored."""


class Replay:
    """Items of one shape, the newest `capacity` of them, drawn in proportion to priority^exponent.

    Item number k lies in slot k modulo capacity, so the oldest is the one that makes room. What was
    drawn is named by its number, not by its slot: a priority that comes after the item has gone
    cannot hit its successor.
    """

    def __init__(self, spec: Spec, capacity: int, exponent: float = 0.9) -> None:
        if capacity < 1 or not 0.0 <= exponent < np.inf or not spec:
            raise ConfigError(
                "a replay needs fields, a capacity of at least 1 and an exponent of at least 0, "
                f"got {sorted(spec)}, {capacity} and {exponent}"
            )
        self.capacity = capacity
        self.exponent = exponent
        self.tree = SumTree(capacity)
        self._fields: dict[str, NDArray[Any]] = {
            name: np.zeros((capacity, *shape), dtype) for name, (shape, dtype) in spec.items()
        }
        self._inserted = np.zeros((), np.int64)

    def __len__(self) -> int:
        return min(self.inserted, self.capacity)

    @property
    def inserted(self) -> int:
        """How many items ever came in, those that have gone since included."""
        return int(self._inserted)

    def insert(self, items: Mapping[str, NDArray[Any]], priorities: NDArray[np.floating]) -> None:
        """Takes n items in, in order; the oldest go where there is no room.

        Args:
            items: every field, n ...
            priorities: n, at least 0; what has 0 is never drawn, unless the exponent is 0.

        Raises:
            DataError: a field is missing, surplus or of another shape or type.
            NonFinite: a priority is no number. In either case nothing was taken in.
        """
        rows = len(priorities)
        self._refuse(items, rows)
        if rows == 0:
            return
        if rows > self.capacity:
            raise DataError(f"{rows} items at once do not fit a replay of {self.capacity}")
        slots = (self.inserted + np.arange(rows)) % self.capacity
        self.tree.put(slots, self._masses(priorities))
        for name, stored in self._fields.items():
            stored[slots] = items[name]
        self._inserted += rows

    def draw(self, count: int, random: np.random.Generator) -> Drawn:
        """`count` independent draws, with replacement.

        Raises:
            DataError: nothing is stored, or nothing that has a priority above 0.
        """
        total = self.tree.total
        if not total > 0.0:
            raise DataError(
                f"nothing can be drawn from a replay of {len(self)} items with priorities all 0"
            )
        slots = self.tree.find(random.random(count) * total)
        last = self.inserted - 1
        return Drawn(
            numbers=last - (last - slots) % self.capacity,
            probabilities=self.tree.masses(slots) / total,
            stored=len(self),
            items={name: stored[slots] for name, stored in self._fields.items()},
        )

    def prioritise(self, numbers: NDArray[np.int64], priorities: NDArray[np.floating]) -> int:
        """Gives the items called `numbers` (n) new priorities (n); of duplicates the last counts.

        Returns:
            How many of them were still there.

        Raises:
            NonFinite: a priority is no number, or negative; nothing was changed.
            DataError: an item has not come in yet.
        """
        masses = self._masses(priorities)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.inserted):
            raise DataError(
                f"priorities for items {numbers.min()} to {numbers.max()} of {self.inserted}"
            )
        there = numbers >= self.inserted - self.capacity
        if there.any():
            self.tree.put(numbers[there] % self.capacity, masses[there])
        return int(there.sum())

    @property
    def state(self) -> dict[str, Tensor]:
        """All that the replay remembers, as tensors that share its memory.

        They are saved as they are and restored by copying into them.
        """
        held = {"inserted": self._inserted, "masses": self.tree.nodes}
        held |= {f"items.{name}": stored for name, stored in self._fields.items()}
        return {name: torch.from_numpy(array) for name, array in held.items()}

    def _masses(self, priorities: NDArray[np.floating]) -> NDArray[np.float64]:
        found = np.asarray(priorities, np.float64)
        if not (np.isfinite(found).all() and (found >= 0.0).all()):
            raise NonFinite(f"priorities must be finite and at least 0, got {found.tolist()}")
        return np.power(found, self.exponent)

    def _refuse(self, items: Mapping[str, NDArray[Any]], rows: int) -> None:
        if items.keys() != self._fields.keys():
            raise DataError(f"items have fields {sorted(items)}, expected {sorted(self._fields)}")
        for name, stored in self._fields.items():
            came = np.asarray(items[name])
            if came.shape != (rows, *stored.shape[1:]) or came.dtype != stored.dtype:
                raise DataError(
                    f"field {name!r} is {came.dtype} of shape {came.shape}, "
                    f"expected {stored.dtype} of shape {(rows, *stored.shape[1:])}"
                )


@dataclass
class Pace:
    """Where a learner's time went, in seconds; a learner that mostly waits is starved."""

    waiting: float = 0.0
    """For new sequences."""
    learning: float = 0.0

    @property
    def starved(self) -> float:
        """Share of the time that was spent waiting."""
        return self.waiting / max(self.waiting + self.learning, 1e-9)


def inserts_before(update: int, *, batch: int, ratio: float, minimum: int) -> int:
    """How many items have to have come in before update number `update` (from 0) may draw.

    Kept from update to update, it makes the replay ratio exact in the long run, whatever fraction
    batch / ratio is: each item is drawn `ratio` times on average.

    Args:
        update: index of the update.
        batch: items that an update draws.
        ratio: items drawn for each that comes in.
        minimum: items to begin with.
    """
    return minimum + int(update * batch / ratio)


def replay_bytes(spec: Spec, capacity: int) -> int:
    """Memory that a replay of `capacity` such items takes."""
    item = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())
    return capacity * item + SumTree(capacity).nodes.nbytes
