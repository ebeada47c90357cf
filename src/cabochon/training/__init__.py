"""Training: the loop, optimizers and schedules, checkpoints and run directories."""

from cabochon.training.fit import finish, fit
from cabochon.training.optimizers import OptimizerConfig, adamw
from cabochon.training.precision import float32_weights
from cabochon.training.runs import Outcome, Record, Run, TrainingState, create, supervise
from cabochon.training.schedules import constant, cosine, linear

__all__ = [
    "OptimizerConfig",
    "Outcome",
    "Record",
    "Run",
    "TrainingState",
    "adamw",
    "constant",
    "cosine",
    "create",
    "finish",
    "fit",
    "float32_weights",
    "linear",
    "supervise",
]
