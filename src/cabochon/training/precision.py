"""Float32 masters for parameters that are kept in bfloat16.

A bfloat16 weight has 8 significant bits: an update smaller than 1/256 of it is lost. So the
optimizer works on float32 copies; gradients move into them as soon as autograd has made them, in
float32 over all micro-batches, and after each update the masters are rounded into the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cabochon.core.errors import ConfigError

__all__ = ["float32_weights", "master_of", "masters", "publish", "refuse_short_types"]

_LONG_TYPES = (torch.float32, torch.float64)
_MASTER = "float32_master"
_WORKING = "working_copy"


def master_of(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 or float64 parameter that an optimizer is to hold instead of `parameter`.

    That is `parameter` itself unless it is of a shorter type. Otherwise a float32 copy, into whose
    `.grad` every later gradient of `parameter` is added, leaving `parameter.grad` empty. Asked for
    a second time, a new copy takes the place of the first.
    """
    if parameter.dtype in _LONG_TYPES:
        return parameter
    master = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
    vars(master)[_WORKING] = parameter
    if parameter.requires_grad and _MASTER not in vars(parameter):
        parameter.register_post_accumulate_grad_hook(_move_gradient)
    # Weak: the masters live as long as their optimizer, not as long as the model.
    vars(parameter)[_MASTER] = weakref.ref(master)
    return master


def masters(optimizer: Optimizer) -> list[tuple[int, nn.Parameter]]:
    """The masters among an optimizer's parameters, with their place in the order of its groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(place, p) for place, p in enumerate(parameters) if _WORKING in vars(p)]


@torch.no_grad()
def publish(parameters: Iterable[nn.Parameter]) -> None:
    """Rounds masters into the parameters that they are masters of; others are left alone."""
    for master in parameters:
        if _WORKING in vars(master):
            vars(master)[_WORKING].copy_(master)


def float32_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, each as its master where it has one; detached, not copied."""
    weights = {}
    for name, parameter in model.named_parameters():
        reference = vars(parameter).get(_MASTER)
        master = None if reference is None else reference()
        weights[name] = (parameter if master is None else master).detach()
    return weights


def refuse_short_types(optimizer: Optimizer) -> None:
    """Looks at what an optimizer would update in place.

    Raises:
        ConfigError: it holds parameters shorter than float32.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dtype not in _LONG_TYPES:
                raise ConfigError(
                    f"the optimizer holds {parameter.dtype} parameters, in which small updates "
                    "vanish; make it with training.adamw, which keeps float32 masters of them"
                )


def _move_gradient(parameter: Tensor) -> None:
    master = vars(parameter)[_MASTER]()
    if master is None or parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
