"""What every room shares: the records that travel, the protocols, the errors, keyed randomness."""

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
)
from cabochon.core.types import (
    Completion,
    Group,
    LinearPrediction,
    Loss,
    Step,
    TokenBatch,
    soft_cap,
)

__all__ = [
    "Backbone",
    "CabochonError",
    "Cache",
    "Completion",
    "Group",
    "Key",
    "LinearPrediction",
    "Loss",
    "Objective",
    "Policy",
    "Prediction",
    "RewardFn",
    "Sampler",
    "Step",
    "TokenBatch",
    "soft_cap",
]
