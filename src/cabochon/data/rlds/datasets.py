"""Episodes, and windows of them, as datasets of PyTorch.

Both open their files anew in every worker. Numbers come as tensors; texts, ragged columns and
unsigned integers wider than a byte, which torch only half knows, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cabochon.core.errors import DataError
from cabochon.data.rlds.records import Episode, mapped_leaves
from cabochon.data.rlds.windows import window_count, windows

__all__ = ["EpisodeDataset", "WindowDataset", "tensors"]

_KNOWN = {
    np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}


def tensors(tree: Any) -> Any:
    """The same columns as tensors, which share their memory where it can be written to."""

    def tensor(column: Any) -> Any:
        if not isinstance(column, np.ndarray) or column.dtype not in _KNOWN:
            return column
        return torch.from_numpy(column if column.flags.writeable else column.copy())

    return mapped_leaves(tree, tensor)


class EpisodeDataset(Dataset[dict[str, Any]]):
    """One item is one episode: `{"steps": columns, "metadata": ...}`.

    Episodes differ in length, so a loader needs `batch_size=None` or a `collate_fn` of its own.
    """

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = episodes

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        episode = self.episodes[index]
        return {"steps": tensors(episode.steps), "metadata": dict(episode.metadata)}


class WindowDataset(Dataset[dict[str, Any]]):
    """One item is one whole window of steps; windows never cross episodes.

    The whole episode is decoded for each window asked for: for long ones with pictures, go through
    `windows` episode by episode.

    Args:
        episodes: where they come from. Their lengths are asked for once.
        size: steps of a window.
        shift: from one window to the next; 1 when absent.
        stride: between the steps of a window.
    """

    def __init__(
        self, episodes: Sequence[Episode], size: int, *, shift: int = 1, stride: int = 1
    ) -> None:
        self.episodes, self.size, self.shift, self.stride = episodes, size, shift, stride
        asked = getattr(episodes, "episode_lengths", None)
        lengths = asked() if asked is not None else [len(each) for each in episodes]
        counts = [
            window_count(int(n), size, shift=shift, stride=stride, drop_remainder=True)
            for n in lengths
        ]
        self.ends = np.cumsum(counts)
        if not len(counts) or not self.ends[-1]:
            raise DataError(f"no episode is as long as a window of {size} steps")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        number = int(np.searchsorted(self.ends, row, side="right"))
        within = row - (int(self.ends[number - 1]) if number else 0)
        episode = self.episodes[number]
        start = within * self.shift
        part = mapped_leaves(episode.steps, lambda column: column[start:])
        first = Episode(steps=part, metadata=episode.metadata)
        found: dict[str, Any] = tensors(next(windows(first, self.size, stride=self.stride)))
        return found
