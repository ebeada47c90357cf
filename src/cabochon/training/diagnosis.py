"""What to say about an update that cannot be made.

Only reached when a run is about to stop, so it may compute micro-batches and rows once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cabochon.core import Loss, Objective, TokenBatch
from cabochon.training.parallel import ranks

__all__ = ["NO_GRADIENT", "of_gradient", "of_loss", "of_weight"]

NO_GRADIENT = (
    "no parameter of the optimizer received a gradient; "
    "are they frozen, or was the optimizer made for another model?"
)

M = TypeVar("M")
B = TypeVar("B")


def of_weight(index: int, batches: int) -> str:
    """For an update whose weight is 0."""
    return (
        f"update {index}: not a single unit counts in its {batches} micro-batches; every target is "
        "masked out, so there is nothing to learn from"
    )


def of_loss(
    index: int, model: M, objective: Objective[M, B], batches: Sequence[B], losses: Sequence[Loss]
) -> str:
    """Names the micro-batches, and the rows of token batches, whose loss is not finite."""
    found = [i for i, loss in enumerate(losses) if not torch.isfinite(loss.total)]
    if not found:
        return (
            f"update {index}: the loss summed over all ranks is not finite; another rank names why"
        )
    first, batch = found[0], batches[found[0]]
    value = losses[first].total.item()
    rows = _rows(model, objective, batch) if isinstance(batch, TokenBatch) else []
    where = f", rows {_listed(rows)}" if rows else ""
    others = f" (also in micro-batches {_listed(found[1:])})" if found[1:] else ""
    return (
        f"update {index}: the loss of micro-batch {first}{where} is {value}{others}; "
        "the weights are those of the update before"
    )


def of_gradient(
    index: int, model: M, objective: Objective[M, B], batches: Sequence[B], optimizer: Optimizer
) -> str:
    """Names the micro-batches that alone give such a gradient, and the parameters that carry it."""
    parameters = _named(optimizer)
    broken = [name for name, p in parameters if _broken(p)]
    found: list[int] = []
    if ranks() == 1:
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            total = objective(model, batch).total
            if total.requires_grad:
                total.backward()
            if any(_broken(p) for _, p in parameters):
                found.append(i)
        optimizer.zero_grad()
    where = f" of micro-batch {_listed(found)}" if found else ""
    return (
        f"update {index}: the gradient{where} is not finite in {_listed(broken) or 'its norm'}; "
        "the weights are those of the update before"
    )


def _rows(model: M, objective: Objective[M, B], batch: TokenBatch) -> list[int]:
    rows = []
    with torch.no_grad():
        for row in range(batch.shape[0]):
            # isinstance above has shown that B is TokenBatch
            one: B = batch.rows(row, row + 1)  # type: ignore[assignment]
            if not torch.isfinite(objective(model, one).total):
                rows.append(row)
    return rows


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    for group in optimizer.param_groups:
        names = group.get("param_names", ())
        for place, parameter in enumerate(group["params"]):
            name = names[place] if place < len(names) else f"parameter {len(named)}"
            named.append((name, parameter))
    return named


def _broken(parameter: Tensor) -> bool:
    return parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())


def _listed(items: Sequence[object], most: int = 5) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
