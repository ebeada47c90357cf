"""Weights that are published and read within one process: snapshots that nobody writes to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from cabochon.core.errors import ConfigError, DataError, WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Snapshots", "check_publication"]

NOTHING = -1
"""The version before the first publication."""


def check_publication(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], version: int, last: int
) -> None:
    """Refuse weights of other names, shapes or types, and versions that do not rise.

    Raises:
        WeightsMismatch, ConfigError: as said.
    """
    if expected.keys() != weights.keys():
        odd = sorted(expected.keys() ^ weights.keys())
        raise WeightsMismatch(
            f"the publisher was made for the names of its first tensors; {odd} are only in one "
            "of both"
        )
    for name, tensor in weights.items():
        there = expected[name]
        if tensor.shape != there.shape or tensor.dtype != there.dtype:
            raise WeightsMismatch(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the publisher was made for "
                f"{there.dtype} {tuple(there.shape)}"
            )
    if not version > last:
        raise ConfigError(f"versions rise: {version} was published after {last}")


class Snapshots:
    """A `Publisher`, and its `Subscriber`: a publication is a copy, reading it copies nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._expected = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        self._newest: tuple[int, Mapping[str, Tensor]] = (NOTHING, {})

    @property
    def version(self) -> int:
        """As the protocol says."""
        return self._newest[0]

    def publish(self, weights: Mapping[str, Tensor], /, version: int) -> None:
        """As the protocol says."""
        check_publication(self._expected, weights, version, self.version)
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in weights.items()
        }
        # One assignment: a reader has the pair of before or the pair of after.
        self._newest = (version, MappingProxyType(copies))

    def subscriber(self) -> Snapshots:
        """As the protocol says."""
        return self

    def newest(self) -> tuple[int, Mapping[str, Tensor]]:
        """As the protocol says."""
        newest = self._newest
        if newest[0] == NOTHING:
            raise DataError("no weights have been published yet")
        return newest
