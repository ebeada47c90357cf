"""What the rooms ask of one another.

Parameters are positional-only, so that plain functions and closures satisfy the protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from cabochon.core.keys import Key
from cabochon.core.types import (
    Group,
    GroupTargets,
    Loss,
    SampledTargets,
    TokenBatch,
    TopKTargets,
)

__all__ = [
    "Backbone",
    "Cache",
    "Objective",
    "Policy",
    "Prediction",
    "RewardFn",
    "Sampler",
    "Teacher",
]

M = TypeVar("M", contravariant=True)
B = TypeVar("B", contravariant=True)


@runtime_checkable
class Prediction(Protocol):
    """Next-token logits that exist only where they are asked for.

    Soft-caps and temperature are already inside. (B, T, V) is never built unless wanted.
    """

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32, for the chosen rows of the flattened (B T) positions."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Anything that predicts the next token: a model, a guided pair, a teacher."""

    def __call__(self, batch: TokenBatch, /) -> Prediction:
        """Predictions at every position of the batch."""
        ...


class Teacher(Protocol):
    """What a student learns from: any policy; or a file or server that says less than all.

    The positions of the batch whose mask is True are asked for; of the others it need say nothing.
    """

    def __call__(
        self, batch: TokenBatch, /
    ) -> Prediction | TopKTargets | SampledTargets | GroupTargets:
        """Its distribution over the next token, whole, cut to the likeliest, or drawn from."""
        ...


class Cache(Protocol):
    """The past of the rows of a batch, owned by the model that made it."""

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        ...

    def select(self, rows: Tensor, /) -> Cache:
        """A cache with the past of the chosen rows (n int64), in that order; this one is used up.

        A row may be chosen several times: samples of one prompt share its reading. None may be
        chosen: the memory is kept for what `put` brings.
        """
        ...

    def put(self, rows: Tensor, other: Any, sources: Tensor, /) -> None:
        """Let `rows` (n int64) hold what `sources` (n int64) of another cache hold.

        The other one is of the same model, and stays as it is. Rows that follow the last one, in
        order, are new; there may be as many as the cache was made for.
        """
        ...

    def rewind(self, lengths: Sequence[int], /) -> None:
        """Take the newest tokens of each row back, so that so many are left of it."""
        ...


class Backbone(Protocol):
    """A policy that can go on from a cache instead of reading everything again."""

    @property
    def context(self) -> int:
        """Tokens of the longest document the model is meant for."""
        ...

    def __call__(self, batch: TokenBatch, cache: Cache | None = None, /) -> Prediction:
        """Predictions for the new tokens of `batch`, whose past, if any, is in `cache`.

        With a cache each row holds one document; `batch.positions` say where its new tokens stand
        and the cache remembers them. Tokens of document -1 are padding and are not remembered.
        """
        ...

    def new_cache(self, rows: int, capacity: int, ahead: int = 0, /) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens.

        Its `rewind` can take back up to `ahead` tokens of a row.
        """
        ...


class Sampler(Protocol):
    """Draws from a policy as it is now; all randomness comes from the key."""

    def __call__(self, prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
        """One group for each prompt, in order."""
        ...


class RewardFn(Protocol):
    """How good completions are. It sees whole groups, so comparisons need no other interface."""

    def __call__(self, groups: Sequence[Group], /) -> Tensor:
        """P G: one number for each completion, higher is better."""
        ...


class Objective(Protocol[M, B]):
    """What is minimised: pure, without optimiser, logging or hidden state."""

    def __call__(self, model: M, batch: B, /) -> Loss:
        """The summed loss of one micro-batch."""
        ...
