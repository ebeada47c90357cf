"""Episodes from and to Minari and Hugging Face `datasets`.

Minari keeps T + 1 observations and T actions, rewards and flags; further columns of a step travel
in its `infos`. It has no discount: one that says more than where an episode ended is refused. A
Hugging Face dataset has one row for each episode, its columns the leaves of steps and metadata, and
the specification in its description, so that what comes back has the same dtypes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError, MissingExtra
from cabochon.data.rlds.records import (
    CORE,
    Episode,
    Ragged,
    column_of,
    episode_of,
    flat,
    mapped_leaves,
    nested,
)
from cabochon.data.rlds.spec import Array, Feature, Image, Label, Rows, Spec, Text, leaf_features

__all__ = ["from_hf", "from_minari", "minari_fields", "to_hf", "to_minari"]


def from_minari(dataset: Any) -> Iterator[Episode]:
    """The episodes of a Minari dataset, streamed; its `infos` become the column `info`.

    Args:
        dataset: what `minari.load_dataset` gives, or any iterable of such episodes.
    """
    episodes = dataset.iterate_episodes() if hasattr(dataset, "iterate_episodes") else dataset
    for each in episodes:
        episode = episode_of(
            observations=_columns(each.observations),
            actions=_columns(each.actions),
            rewards=np.asarray(each.rewards),
            terminated=bool(len(each.terminations) and each.terminations[-1]),
            metadata={"episode_id": str(each.id)},
        )
        infos = _columns(each.infos) if getattr(each, "infos", None) else {}
        steps = {**episode.steps, "info": infos} if infos else episode.steps
        yield Episode(steps=steps, metadata=episode.metadata)


def minari_fields(episode: Episode) -> dict[str, Any]:
    """What a Minari `EpisodeBuffer` holds of an episode; metadata has no place there.

    Raises:
        DataError: the episode is not aligned SAR, has no final observation, or has discounts other
            than 1, and 0 where it ended.
    """
    if episode.alignment != "SAR" or episode.last_step_valid:
        raise DataError("Minari holds episodes aligned SAR with a final observation")
    count = episode.transitions
    steps = episode.steps
    ended = np.arange(count) == count - 1
    wanted = 1.0 - (ended & episode.terminated)
    if "discount" in steps and not np.array_equal(steps["discount"][:count], wanted):
        raise DataError("Minari holds no discounts, and these say more than where it ended")
    extras = {name: value for name, value in steps.items() if name not in CORE}
    infos = extras.pop("info", {})
    return {
        "observations": steps["observation"],
        "actions": mapped_leaves({"a": steps["action"]}, lambda column: column[:count])["a"],
        "rewards": list(steps["reward"][:count]),
        "terminations": (ended & episode.terminated).tolist(),
        "truncations": (ended & (not episode.terminated)).tolist(),
        "infos": {**infos, **extras},
    }


def to_minari(episodes: Iterable[Episode], dataset_id: str, **described: Any) -> Any:
    """A Minari dataset of these episodes, in its own folder for datasets.

    Args:
        episodes: all are held in memory: Minari writes them at once.
        dataset_id: as Minari wants it, `name-v0`.
        described: what `minari.create_dataset_from_buffers` takes: `env` or the two spaces, author.

    Raises:
        DataError: see `minari_fields`.
    """
    try:
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer
    except ImportError as error:
        raise MissingExtra("minari[hdf5]", "minari", "writing a Minari dataset") from error
    buffers = [
        EpisodeBuffer(id=number, **minari_fields(each)) for number, each in enumerate(episodes)
    ]
    return minari.create_dataset_from_buffers(dataset_id, buffers, **described)


def to_hf(episodes: Iterable[Episode]) -> Any:
    """A `datasets.Dataset` with one row for each episode, alike in their features.

    Raises:
        DataError: two episodes differ in their columns, or a column is empty in a dimension, which
            lists cannot say.
    """
    datasets = _datasets()
    rows, spec = [], None
    for episode in episodes:
        spec = spec or Spec.of(episode)
        rows.append(
            {
                **{f"steps/{name}": _listed(name, c) for name, c in flat(episode.steps).items()},
                **{name: _listed(name, c) for name, c in flat(episode.metadata).items()},
            }
        )
    if spec is None:
        raise DataError("there is no episode to make a dataset of")
    known = {name: _hf_feature(each, datasets) for name, each in _leaves(spec).items()}
    for number, row in enumerate(rows):
        if row.keys() != known.keys():
            differing = sorted(row.keys() ^ known.keys())
            raise DataError(f"episode {number} differs from episode 0 in its columns: {differing}")
    columns = {name: [row[name] for row in rows] for name in known}
    described = datasets.DatasetInfo(
        description=json.dumps({"rlds": spec.to_json()}), features=datasets.Features(known)
    )
    return datasets.Dataset.from_dict(columns, features=described.features, info=described)


def from_hf(dataset: Any, spec: Spec | None = None) -> Iterator[Episode]:
    """The episodes of a dataset that `to_hf` made, streamed.

    Args:
        dataset: a `datasets.Dataset`.
        spec: what the episodes consist of; the dataset's description says it when absent.

    Raises:
        DataError: nothing says what the episodes consist of, or a column is missing.
    """
    if spec is None:
        try:
            spec = Spec.from_json(json.loads(dataset.info.description)["rlds"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(
                "the dataset's description has no specification of episodes; give `spec`"
            ) from None
    features = _leaves(spec)
    missing = sorted(features.keys() - set(dataset.column_names))
    if missing:
        raise DataError(f"the dataset has no columns {missing}")
    for row in dataset.with_format(None):
        leaves = {name: _column(row[name], feature) for name, feature in features.items()}
        steps = {
            name.removeprefix("steps/"): value
            for name, value in leaves.items()
            if name.startswith("steps/")
        }
        metadata = {name: value for name, value in leaves.items() if not name.startswith("steps/")}
        yield Episode(steps=nested(steps), metadata=nested(metadata))


def _leaves(spec: Spec) -> dict[str, Feature]:
    """Every leaf with its time dimension: steps as rows of any number."""
    steps = {f"steps/{name}": Rows(feature=f) for name, f in leaf_features(spec.steps).items()}
    return {**steps, **leaf_features(spec.metadata)}


def _hf_feature(feature: Feature, datasets: Any) -> Any:
    if isinstance(feature, Rows):
        return datasets.List(_hf_feature(feature.feature, datasets))
    if isinstance(feature, Text):
        return datasets.Value("string")
    if isinstance(feature, Label):
        return datasets.Value("int64")
    kind = "uint8" if isinstance(feature, Image) else feature.dtype
    found = datasets.Value("binary" if kind == "string" else kind)
    for _ in feature.shape:
        found = datasets.List(found)
    return found


def _listed(name: str, column: Any) -> Any:
    if isinstance(column, Ragged):
        return [_listed(name, row) for row in column]
    if isinstance(column, str | bytes):
        return column
    array = np.asarray(column)
    if 0 in array.shape[1:]:
        raise DataError(f"{name} has shape {array.shape}; lists cannot say an empty dimension")
    if array.ndim > 1:
        return [_listed(name, row) for row in array]
    return array.tolist() if array.dtype == object or not array.ndim else array  # keeps the dtype


def _column(values: Any, feature: Feature) -> Any:
    if isinstance(feature, Rows) and isinstance(feature.feature, Rows):
        rows = [_column(value, feature.feature) for value in values]
        if rows:
            return Ragged.of(rows)
        return Ragged(values=_column([], feature.feature), lengths=np.zeros(0, np.int64))
    inner = feature.feature if isinstance(feature, Rows) else feature
    stepwise = isinstance(feature, Rows)
    if isinstance(inner, Text) or (isinstance(inner, Array) and inner.dtype == "string"):
        if not stepwise and not (isinstance(inner, Array) and inner.shape):
            return values
        return np.array(values, object) if values else np.zeros(0, object)
    dtype = "uint8" if isinstance(inner, Image) else "int64"
    shape: tuple[int | None, ...] = getattr(inner, "shape", ())
    array: NDArray[Any] = np.array(values, inner.dtype if isinstance(inner, Array) else dtype)
    if not array.size and stepwise:
        return array.reshape(0, *(each or 0 for each in shape))
    return array if stepwise or shape else array[()]


def _columns(tree: Any) -> Any:
    """Columns of what Minari holds: arrays, or mappings and tuples of such."""
    if isinstance(tree, Mapping):
        return {name: _columns(each) for name, each in tree.items()}
    if isinstance(tree, tuple):
        return {str(place): _columns(each) for place, each in enumerate(tree)}
    if isinstance(tree, list):
        return column_of(tree)
    return np.asarray(tree)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hf", "making a Hugging Face dataset") from error
    return datasets
