"""What every room shares: the records that travel, the protocols, the errors, keyed randomness."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cabochon.core.errors import CabochonError
    from cabochon.core.keys import Key
    from cabochon.core.protocols import (
        Backbone,
        Cache,
        Objective,
        Policy,
        Prediction,
        RewardFn,
        Sampler,
        Teacher,
    )
    from cabochon.core.types import (
        Completion,
        Group,
        GroupTargets,
        LinearPrediction,
        Loss,
        SampledTargets,
        Step,
        TokenBatch,
        TopKTargets,
        soft_cap,
    )

__all__ = [
    "Backbone",
    "CabochonError",
    "Cache",
    "Completion",
    "Group",
    "GroupTargets",
    "Key",
    "LinearPrediction",
    "Loss",
    "Objective",
    "Policy",
    "Prediction",
    "RewardFn",
    "SampledTargets",
    "Sampler",
    "Step",
    "Teacher",
    "TokenBatch",
    "TopKTargets",
    "soft_cap",
]


def __getattr__(name: str) -> object:
    """Most records bring torch with them, so a module comes when a name of it is asked for."""
    for module in ("errors", "keys", "protocols", "types"):
        home = import_module(f"{__name__}.{module}")
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
