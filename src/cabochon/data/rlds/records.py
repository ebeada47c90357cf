"""An episode: its steps as columns, and what is true of it as a whole.

Source: Ramos et al. 2021, "RLDS: an ecosystem to generate, share and use datasets in reinforcement
learning" (arXiv:2111.02767), and its reference code. The steps of an episode of T transitions are
T + 1: step i holds the observation i, the action taken in it, and the reward and discount which
that action brought; the last step holds the final observation, and everything else in it is zero
and means nothing. `is_terminal` says that the environment ended there, so that nothing is to be
gained afterwards; an episode whose last step is not terminal was cut short, and what would have
come is estimated from the final observation.

A step of an episode is no `core.types.Step` (that is an update of a training loop): it is a plain
dictionary, and there is no class for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError

__all__ = [
    "CORE",
    "FLAGS",
    "Alignment",
    "Episode",
    "Ragged",
    "column_of",
    "episode_of",
    "flat",
    "mapped_leaves",
    "nested",
    "step_columns",
    "zeros_like",
]

Alignment = Literal["SAR", "ARS", "RSA"]
"""In which order the things of one step happened: state, action, reward is the standard."""

FLAGS = ("is_first", "is_last", "is_terminal")
CORE = ("observation", "action", "reward", "discount", *FLAGS)
"""The names of a step that the standard gives a meaning; every other one is a step's metadata."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Rows of different lengths, one behind the other."""

    values: NDArray[Any] | Ragged
    """As many as the lengths add up to."""
    lengths: NDArray[np.int64]
    """n int64: of each row."""

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or (self.lengths < 0).any():
            raise DataError(f"lengths of rows are counts, got {self.lengths!r}")
        if int(self.lengths.sum()) != len(self.values):
            found = f"{len(self.values)} values, rows of {int(self.lengths.sum())} in all"
            raise DataError(f"{found}; they must agree")

    @staticmethod
    def of(rows: Sequence[Any]) -> Ragged:
        """From its rows: arrays alike but for their first dimension, or ragged themselves."""
        lengths = np.array([len(row) for row in rows], np.int64)
        if rows and isinstance(rows[0], Ragged):
            inner = Ragged.of([row[i] for row in rows for i in range(len(row))])
            return Ragged(values=inner, lengths=lengths)
        arrays = [np.asarray(row) for row in rows]
        if len({(each.dtype, each.shape[1:]) for each in arrays}) > 1:
            raise DataError("ragged rows must have one dtype and one shape behind the first")
        values = np.concatenate(arrays) if arrays else np.zeros(0, np.float32)
        return Ragged(values=values, lengths=lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice) -> Any:
        """A row; or, for a slice of step 1, the rows from one to another as ragged ones."""
        ends = np.cumsum(self.lengths)
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                return Ragged.of([self[i] for i in range(start, stop, stride)])
            begin = int(ends[start - 1]) if start else 0
            end = int(ends[stop - 1]) if stop > start else begin
            return Ragged(values=self.values[begin:end], lengths=self.lengths[start:stop])
        row = range(len(self))[index]
        return self.values[int(ends[row] - self.lengths[row]) : int(ends[row])]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """Steps as columns, first dimension time; and the metadata of the whole."""

    steps: Mapping[str, Any]
    """Name -> column of T + 1 rows (array or `Ragged`), or a mapping of such. Text is an array of
    dtype object."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Name -> array, string or number, or a mapping of such. The standard names `episode_id`,
    `agent_id`, `environment_config`, `experiment_id` and `invalid` (True: to be left out)."""
    alignment: Alignment = "SAR"
    last_step_valid: bool = False
    """True where the last step holds a real action and reward, whose observation after it was
    never stored. It is never guessed: whoever reads such a dataset says so."""

    def __post_init__(self) -> None:
        if "steps" in self.metadata:
            raise DataError("metadata may not be called `steps`; choose another name")

    def __len__(self) -> int:
        """How many steps, the final observation's included."""
        return len(next(iter(flat(self.steps).values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One step."""
        row = range(len(self))[index]
        return mapped_leaves(self.steps, lambda column: column[row])

    @property
    def transitions(self) -> int:
        """How many actions with their rewards there are."""
        return len(self) if self.last_step_valid else len(self) - 1

    @property
    def invalid(self) -> bool:
        """True where the metadata says that the episode is to be left out."""
        return bool(self.metadata.get("invalid", False))

    @property
    def terminated(self) -> bool:
        """True if the environment ended it, False if it was cut short."""
        flags = self.steps.get("is_terminal")
        return flags is not None and bool(flags[-1])

    def total_reward(self) -> float:
        """The undiscounted sum of the rewards that are real."""
        reward = np.asarray(self.steps["reward"], np.float64)
        if self.last_step_valid:
            return float(reward.sum())
        return float(reward[:-1].sum() if self.alignment == "SAR" else reward[1:].sum())


def episode_of(
    *,
    observations: Any,
    actions: Any,
    rewards: Any,
    terminated: bool,
    extras: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Episode:
    """An episode from what an environment gave.

    Args:
        observations: T + 1 of them, the final one included: an array or a mapping of arrays.
        actions: T of them, likewise.
        rewards: T of them. Their dtype is kept.
        terminated: the environment ended it; False where it was cut short.
        extras: further columns of a step, T rows each.
        metadata: of the whole episode.

    The discounts are 1, and 0 for the transition into a terminal step, as float32.

    Raises:
        DataError: the numbers of rows do not fit each other.
    """
    rewards = np.asarray(rewards)
    count = len(rewards)
    discount = np.ones(count, np.float32)
    if terminated and count:
        discount[-1] = 0
    taken = {"action": actions, "reward": rewards, "discount": discount, **(extras or {})}
    for name, column in flat({"observation": observations, **taken}).items():
        want = count + (name.split("/")[0] == "observation")
        if len(column) != want:
            raise DataError(
                f"{name} has {len(column)} rows, expected {want}: an episode of {count} rewards "
                f"has {count} actions and {count + 1} observations, the final one included"
            )
    place = np.arange(count + 1)
    steps = {
        "observation": mapped_leaves({"o": observations}, _column)["o"],
        **mapped_leaves(taken, _padded),
        "is_first": place == 0,
        "is_last": place == count,
        "is_terminal": (place == count) & terminated,
    }
    return Episode(steps=steps, metadata=dict(metadata or {}))


def column_of(values: Sequence[Any]) -> NDArray[Any]:
    """A column from its rows, which must be alike in shape and dtype; text becomes objects.

    Raises:
        DataError: two rows differ; it says which and how.
    """
    if values and isinstance(values[0], str | bytes):
        column = np.empty(len(values), object)
        column[:] = values
        return column
    rows = [np.asarray(value) for value in values]
    for number, row in enumerate(rows):
        if (row.shape, row.dtype) != (rows[0].shape, rows[0].dtype):
            raise DataError(
                f"step {number} is {row.dtype} {row.shape}, step 0 is {rows[0].dtype} "
                f"{rows[0].shape}; every step of an episode has the same (or use Ragged)"
            )
    return np.stack(rows) if rows else np.zeros(0, np.float32)


def step_columns(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns from single steps.

    Raises:
        DataError: two steps differ in their keys, or in the shape or dtype of one.
    """
    rows = [flat(step) for step in steps]
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            differing = sorted(row.keys() ^ rows[0].keys())
            raise DataError(f"step {number} differs from step 0 in its keys: {differing}")
    columns = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = column_of([row[name] for row in rows])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return nested(columns)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *above, name = path.split("/")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def mapped_leaves(tree: Mapping[str, Any], function: Any) -> dict[str, Any]:
    """The same tree with `function` of every leaf."""
    return {
        name: mapped_leaves(value, function) if isinstance(value, Mapping) else function(value)
        for name, value in tree.items()
    }


def zeros_like(column: Any, rows: int) -> Any:
    """So many rows that mean nothing, of the form of `column`: zeros, empty texts, empty rows."""
    if isinstance(column, Ragged):
        return Ragged(values=column.values[:0], lengths=np.zeros(rows, np.int64))
    if column.dtype == object:
        filled = np.empty(rows, object)
        filled[:] = b"" if len(column) and isinstance(column[0], bytes) else ""
        return filled
    return np.zeros((rows, *column.shape[1:]), column.dtype)


def _column(values: Any) -> Any:
    if isinstance(values, Ragged):
        return values
    array = values if isinstance(values, np.ndarray) else column_of(list(values))
    return array.astype(object) if array.dtype.kind in "US" else array


def _padded(values: Any) -> Any:
    column = _column(values)
    if isinstance(column, Ragged):
        return Ragged(values=column.values, lengths=np.append(column.lengths, 0))
    return np.concatenate([column, zeros_like(column, 1)])
