"""Keyed randomness: a stream of random numbers has a name, never a history.

A generator that is carried from step to step has to be saved, and a sampler that draws one number
more shifts everything after it. Here each use asks for the stream of its own name, (seed, purpose,
step, ...), so that resuming is starting at step n and a neighbour never changes a draw.
"""

from __future__ import annotations

import hashlib
import json
import operator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Key"]


@dataclass(frozen=True)
class Key:
    """One named stream: a seed and the branches taken from it.

    ``Key(0).fold("dropout", 12)`` and ``Key(0).fold("dropout", 13)`` are independent streams; the
    order and the types of the branches count, and equal keys give equal numbers on every machine.
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def fold(self, *branches: str | int) -> Key:
        """The stream further down: this key's path with `branches` appended."""
        return Key(self.seed, self.path + branches)

    def integer(self) -> int:
        """63 bits that depend on the whole name (BLAKE2b)."""
        path = [part if isinstance(part, str) else operator.index(part) for part in self.path]
        name = json.dumps([operator.index(self.seed), *path])
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator at the beginning of this stream."""
        return torch.Generator(device).manual_seed(self.integer())

    def numpy(self) -> np.random.Generator:
        """A fresh numpy generator at the beginning of this stream (Philox, counter-based)."""
        return np.random.Generator(np.random.Philox(key=self.integer()))
