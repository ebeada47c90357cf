"""An LSTM over unrolls in which episodes end and begin, and the frames an agent still sees.

A state is zero where an episode begins, before the first observation is read. Between two times at
which any row begins anew the library's LSTM runs as a whole.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Stacked", "run_lstm", "stack_frames"]


class Stacked(NamedTuple):
    """Observations together with those before them."""

    frames: Tensor
    """T B k ...: oldest first, the observation itself last."""
    state: Tensor
    """B k-1 ...: what the observation after the last will be stacked on."""


def stack_frames(observation: Tensor, first: Tensor, state: Tensor) -> Stacked:
    """Each observation with the k - 1 before it in the same episode; zeros before its beginning.

    Args:
        observation: T B ....
        first: T B bool: the observation begins an episode.
        state: B k-1 ...: the observations before the first, oldest first.
    """
    before = state.movedim(1, 0)  # k-1 B ...
    every = torch.cat([before, observation])
    length, past = len(observation), len(before)
    windows = torch.stack([every[i : i + length] for i in range(past + 1)], dim=2)
    # The window's place j is seen if no episode began after it, up to the observation itself.
    begun = torch.cat([first.new_zeros(past, first.shape[1]), first]).cumsum(0)
    now = begun[past:]
    seen = torch.stack([begun[i : i + length] == now for i in range(past + 1)], dim=2)
    seen[:, :, -1] = True
    shaped = seen.view(*seen.shape, *[1] * (observation.ndim - 2))
    frames = windows * shaped
    return Stacked(frames, frames[-1, :, 1:])


def run_lstm(
    lstm: nn.LSTM, inputs: Tensor, first: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """The outputs, the state after the last, and the states that beginnings put an end to.

    Args:
        lstm: of one layer.
        inputs: T B D.
        first: T B bool: the state is zeroed before this input is read.
        state: hidden and cell, B H each.

    Returns:
        T B H; B H each; and for every time at which a row begins anew, the state of all rows as it
        was before the zeroing.
    """
    hidden, cell = state
    starts = first.any(1).nonzero().flatten().tolist()
    ends = sorted({0, *starts, len(inputs)})
    outputs, ended = [], {}
    for begin, end in pairwise(ends):
        if begin in starts:
            ended[begin] = (hidden, cell)
            keep = (~first[begin]).unsqueeze(1).to(hidden.dtype)
            hidden, cell = hidden * keep, cell * keep
        part, (hidden, cell) = lstm(inputs[begin:end], (hidden[None], cell[None]))
        hidden, cell = hidden[0], cell[0]
        outputs.append(part)
    return torch.cat(outputs), (hidden, cell), ended
