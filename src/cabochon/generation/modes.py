"""Using a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["device_of", "evaluating"]


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Dropout and the like are off inside; afterwards every module is as it was.

    Args:
        model: any policy; one that is no `nn.Module` has no such state of its own.
    """
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: object, like: Tensor) -> torch.device:
    """Where a model's parameters are; a policy that is no `nn.Module` takes what it is given."""
    return next(model.parameters()).device if isinstance(model, nn.Module) else like.device
