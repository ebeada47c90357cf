"""Episodes that hold one of everything the format knows, and how to compare two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cabochon.data.rlds.records import Episode, Ragged, episode_of, flat, nested


def varied_episode(length: int, seed: int = 0, *, terminated: bool = True) -> Episode:
    """`length` transitions, at least 1."""
    rng = np.random.default_rng([seed, length])
    rows = [rng.integers(0, 9, i % 3, dtype=np.int32) for i in range(length)]
    observations = {
        "image": rng.integers(0, 256, (length + 1, 9, 8, 3), dtype=np.uint8),
        "exact": rng.normal(size=(length + 1, 2)) * 1e-300,
        "half": rng.normal(size=(length + 1,)).astype(np.float16),
        "none": np.zeros((length + 1, 0, 2), np.float32),
        "one": rng.normal(size=(length + 1, 1)).astype(np.float32),
        "bytes": rng.integers(0, 256, (length + 1, 5), dtype=np.uint8),
    }
    return episode_of(
        observations=observations,
        actions=rng.integers(-(2**63), 2**63 - 1, length),
        rewards=rng.normal(size=length),
        terminated=terminated,
        extras={
            "text": np.array([f"ä{i} 🙂" for i in range(length)], object),
            "big": rng.integers(0, 2**64, length, dtype=np.uint64),
            "rows": Ragged.of(rows),
            "deep": Ragged.of([Ragged.of([row, row[:1]]) for row in rows]),
        },
        metadata={
            "episode_id": f"episode {seed}-{length}",
            "invalid": False,
            "config": {"lengths": rng.integers(0, 9, seed % 4), "scale": np.float64(1e-300)},
            "raw": b"\xff\x00",
        },
    )


def without(episode: Episode, *names: str) -> Episode:
    """The episode less some columns."""
    leaves = {name: v for name, v in flat(episode.steps).items() if name not in names}
    return replace(episode, steps=nested(leaves))


def assert_same(found: Episode, wanted: Episode) -> None:
    """Bit for bit: names, dtypes, shapes and values."""
    assert (found.alignment, found.last_step_valid) == (wanted.alignment, wanted.last_step_valid)
    for one, other in ((found.steps, wanted.steps), (found.metadata, wanted.metadata)):
        left, right = flat(one), flat(other)
        assert left.keys() == right.keys()
        for name in right:
            _assert_same_leaf(left[name], right[name], name)


def _assert_same_leaf(found: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, Ragged):
        assert isinstance(found, Ragged), name
        _assert_same_leaf(found.lengths, wanted.lengths, name)
        _assert_same_leaf(found.values, wanted.values, name)
        return
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name
    if wanted.dtype == object:
        assert found.tolist() == wanted.tolist(), name
    else:
        assert found.tobytes() == wanted.tobytes(), name


def needs(format: str) -> None:
    """Skips where the library of a format is not installed."""
    pytest.importorskip("google_crc32c", reason="google-crc32c is not installed (extra rlds)")
    if format == "array_record":
        pytest.importorskip(
            "array_record.python", reason="array-record is not installed (extra rlds)"
        )
