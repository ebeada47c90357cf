"""An LSTM over unrolls in which episodes end and begin, and the frames an agent still sees.

A state is zero where an episode begins, before the first observation is read. Between two times at
which any row begins anew the library's LSTM runs as a whole.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Frames", "run_lstm"]


class Frames(NamedTuple):
    """T observations of B rows, each with the k - 1 before it in the same episode."""

    every: Tensor
    """k-1+T B ...: what was remembered, then the observations."""
    seen: Tensor
    """T B k bool: the window `every[t : t + k]`, without what an earlier episode showed."""

    @staticmethod
    def of(observation: Tensor, first: Tensor, before: Tensor | None) -> Frames:
        """The windows of an unroll.

        Args:
            observation: T B ....
            first: T B bool: the observation begins an episode.
            before: B k-1 ...: the observations before the first, oldest first; none if k is 1.
        """
        if before is None:
            return Frames(observation, torch.ones_like(first).unsqueeze(2))
        length, past = len(observation), before.shape[1]
        # The window's place j is seen if no episode began after it, up to the observation itself.
        begun = torch.cat([first.new_zeros(past, first.shape[1]), first]).cumsum(0)
        now = begun[past:]
        seen = torch.stack([begun[i : i + length] == now for i in range(past + 1)], dim=2)
        seen[:, :, -1] = True
        return Frames(torch.cat([before.movedim(1, 0), observation]), seen)

    def stacked(self) -> Tensor:
        """T B k ...: oldest first, the observation itself last; zeros for what is not seen."""
        length, depth = len(self.seen), self.seen.shape[2]
        if depth == 1:
            return self.every.unsqueeze(2)
        windows = torch.stack([self.every[i : i + length] for i in range(depth)], dim=2)
        return windows * self._over(windows, self.seen)

    def state(self) -> Tensor:
        """B k-1 ...: what the observation after the last will be stacked on."""
        last = self.every[len(self.seen) :].movedim(0, 1)
        return last * self._over(last, self.seen[-1, :, 1:])

    def ended(self, time: Tensor, row: Tensor, observation: Tensor) -> Frames:
        """Windows that end with other observations (n ...) than those of these times and rows.

        They go on from the times before, as if no episode had begun: 1 n.
        """
        past = self.seen.shape[2] - 1
        before = [self.every[time + i, row] for i in range(past)]
        seen = torch.cat([self.seen[time - 1, row, 1:], self.seen[time, row, -1:]], 1)
        return Frames(torch.stack([*before, observation]), seen[None])

    @staticmethod
    def _over(frames: Tensor, seen: Tensor) -> Tensor:
        """`seen` with the axes of `frames`."""
        return seen.view(*seen.shape, *[1] * (frames.ndim - seen.ndim))


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
