"""AdamW over a model's parameters: decay on matrices only, float32 masters where needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from cabochon.core.errors import ConfigError
from cabochon.training.precision import master_of, publish

__all__ = ["OptimizerConfig", "adamw", "is_matrix"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    learning_rate: float = 1e-3
    """The highest; a schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and mean square of the gradient."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Share of a matrix, times the learning rate, that an update takes away."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {self.betas}")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"eps must be above 0 and finite, got {self.eps}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"weight_decay must be finite and not negative, got {self.weight_decay}"
            )


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for what multiplies activations: at least two axes, and no embedding by its name.

    A row of an embedding is a vector that is looked up; decay would shrink rare tokens' rows
    although no gradient answers for them.
    """
    return parameter.ndim >= 2 and "embed" not in name.lower()


def adamw(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    decays: Callable[[str, nn.Parameter], bool] = is_matrix,
) -> Optimizer:
    """AdamW over the parameters of `model` that require gradients.

    Parameters of a type shorter than float32 are held as float32 masters, which are published into
    the model after each update. The fused kernel is used: elementwise, so bit for bit the same
    on any number of threads, and several times faster than the loop.

    Args:
        model: its parameters keep their names in the optimizer's groups ("param_names").
        config: learning rate, betas, eps, weight decay.
        decays: (name, parameter) -> whether weight decay applies.

    Raises:
        ConfigError: no parameter requires a gradient.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[tuple[str, nn.Parameter]] = []
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen = id(parameter) not in embeddings and decays(name, parameter)
            (decayed if chosen else kept).append((name, master_of(parameter)))
    if not decayed and not kept:
        raise ConfigError("no parameter of the model requires a gradient; nothing can be trained")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    optimizer.register_step_post_hook(_publish)
    return optimizer


def _publish(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[Any, Any]) -> None:
    for group in optimizer.param_groups:
        publish(group["params"])
