"""The training loop, as a generator: one `Step` for each update.

Logging, saving, evaluation and moving averages are statements in the caller's `for`. Gradients of
the summed loss are divided by the summed weight once, so that no split of a batch changes anything.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import TypeVar

import torch
from torch.optim import Optimizer

from cabochon.core import Loss, Objective, Step
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.training import diagnosis, parallel
from cabochon.training.precision import refuse_short_types
from cabochon.training.schedules import Schedule

__all__ = ["finish", "fit"]

M = TypeVar("M")
B = TypeVar("B")


def fit(
    model: M,
    objective: Objective[M, B],
    batches: Iterable[B],
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
    schedule: Schedule | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Updates of the optimizer's parameters, one for each `accumulate` micro-batches.

    The batches of an update are pulled after the update before it was applied, so a generator that
    samples from the model sees its present weights. When `batches` end in the middle of an update,
    that update is made from the micro-batches there are, and is the last. Under torch.distributed
    each rank brings its own batches, all make the same update, and the last to run out ends it.

    Args:
        model: handed to the objective as it is.
        objective: the summed loss of one micro-batch.
        batches: micro-batches, from the first of update `start` on.
        optimizer: holds the parameters in float32 or float64, or float32 masters of them.
        accumulate: micro-batches an update.
        max_grad_norm: the mean gradient is shortened to this norm; `math.inf` leaves it alone.
        schedule: update index -> what the initial learning rate of every group is multiplied by.
        start: index of the first update.

    Raises:
        ConfigError: an argument cannot be used, or no parameter receives a gradient.
        DataError: an update in which not a single unit counts.
        NonFinite: a loss or gradient is NaN or infinite; raised before the update, which leaves
            weights and optimizer as the update before left them.
    """
    if accumulate < 1 or not max_grad_norm > 0 or start < 0:
        raise ConfigError(
            "fit needs accumulate >= 1, max_grad_norm > 0 and start >= 0, "
            f"got {accumulate}, {max_grad_norm} and {start}"
        )
    refuse_short_types(optimizer)
    for group in optimizer.param_groups if schedule is not None else ():
        group.setdefault("initial_lr", group["lr"])
    return _updates(
        model, objective, iter(batches), optimizer, accumulate, max_grad_norm, schedule, start
    )


def _updates(
    model: M,
    objective: Objective[M, B],
    batches: Iterator[B],
    optimizer: Optimizer,
    accumulate: int,
    max_grad_norm: float,
    schedule: Schedule | None,
    start: int,
) -> Iterator[Step]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.refuse_unequal_start(parameters)
    for index in count(start):
        optimizer.zero_grad()
        held: list[B] = []  # so that a batch that breaks the update can be named
        losses: list[Loss] = []
        for batch in islice(batches, accumulate):
            held.append(batch)
            losses.append(_backward(model, objective, batch))
        update = parallel.sum_losses(losses, parameters[0].device)
        if update.batches == 0:
            return
        if not math.isfinite(update.total):
            raise NonFinite(diagnosis.of_loss(index, model, objective, held, losses))
        if not update.weight > 0:
            raise DataError(diagnosis.of_weight(index, update.batches))
        gradients = parallel.sum_gradients(parameters)
        if not gradients:
            raise ConfigError(diagnosis.NO_GRADIENT)
        norm = parallel.gradient_norm(gradients) / update.weight
        if not math.isfinite(norm):
            raise NonFinite(diagnosis.of_gradient(index, model, objective, held, optimizer))
        shorten = max_grad_norm / norm if norm > max_grad_norm else 1.0
        torch._foreach_mul_(gradients, shorten / update.weight)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(index)
        optimizer.step()
        del gradients, held, losses
        yield Step(
            index=index,
            loss=update.total / update.weight,
            grad_norm=norm,
            weight=update.weight,
            learning_rate=float(optimizer.param_groups[0]["lr"]),
            report={name: value / update.weight for name, value in update.report.items()},
        )


def _backward(model: M, objective: Objective[M, B], batch: B) -> Loss:
    """The loss without its graph, which must be gone before the next micro-batch comes."""
    loss = objective(model, batch)
    if loss.total.requires_grad:
        loss.total.backward()
    return replace(loss, total=loss.total.detach())


def finish(steps: Iterable[Step]) -> Step | None:
    """The last step of a training run to its end: a generator that nobody iterates does nothing."""
    last = deque(steps, maxlen=1)
    return last[0] if last else None
