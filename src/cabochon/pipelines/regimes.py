"""Where the sequences of a distillation come from: the one thing in which its regimes differ.

    offline          one response of the teacher to each prompt, drawn once
    diverse          k responses of the teacher to each prompt, drawn once
    more_prompts     one response to each of k times as many prompts, drawn once
    online_teacher   a fresh response of the teacher each time a prompt comes
    online_student   a fresh response of the student as it is then

All make equally many updates of equally many sequences. Responses are sampled at temperature 1.

Source: Tiapkin et al. 2025, arXiv:2502.02671, section 3 (offline and online data) and section 5
(more generations, more prompts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cabochon.core import Group, Key, Sampler, TokenBatch
from cabochon.data.order import Order
from cabochon.pipelines.responses import Pair, pairs_of, rows_of

__all__ = ["REGIMES", "Pool", "Regime", "batches", "responses_drawn"]

Regime = Literal["offline", "diverse", "more_prompts", "online_teacher", "online_student"]
REGIMES: tuple[Regime, ...] = (
    "offline",
    "diverse",
    "more_prompts",
    "online_teacher",
    "online_student",
)

DRAWN_TOGETHER = 8
"""Updates for which the teacher draws in one call."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The prompts of a distillation with the teacher's responses."""

    few: Sequence[Group]
    """M prompts with k responses each; the first of them is the offline one."""
    many: Sequence[Group]
    """k M prompts, the first M those of `few`, with one response each."""


def batches(
    regime: Regime, pool: Pool, teacher: Sampler, *, rows: int, key: Key, start: int = 0
) -> Iterator[TokenBatch]:
    """The batches of a distillation from update `start` on, without end.

    In `online_student` a row is a prompt alone: what the student writes after it is not known here.

    Args:
        regime: see this module.
        pool: prompts and responses.
        teacher: draws one response to each prompt.
        rows: sequences of an update.
        key: of the order of reading, and of what the teacher draws.
        start: how many updates were made before.
    """
    if regime in ("online_teacher", "online_student"):
        prompts = [group.prompt for group in pool.few]
        order = Order(key.fold("order"), len(prompts), start * rows)
        if regime == "online_student":
            while True:
                some = [prompts[number] for number in order.take(rows)]
                yield TokenBatch.of(some, masks=[[False] * len(each) for each in some])
        yield from _from_teacher(prompts, teacher, rows=rows, key=key, start=start)
    pairs = _fixed(regime, pool)
    order = Order(key.fold("order"), len(pairs), start * rows)
    while True:
        yield rows_of([pairs[number] for number in order.take(rows)])


def responses_drawn(regime: Regime, pool: Pool, *, rows: int, steps: int) -> int:
    """How many responses a whole distillation asks for, of the teacher or of the student."""
    if regime in ("online_teacher", "online_student"):
        return rows * steps
    return len(_fixed(regime, pool))


def _fixed(regime: Regime, pool: Pool) -> list[Pair]:
    if regime == "more_prompts":
        return pairs_of(pool.many)
    return pairs_of(pool.few, samples=1 if regime == "offline" else None)


def _from_teacher(
    prompts: Sequence[torch.Tensor], teacher: Sampler, *, rows: int, key: Key, start: int
) -> Iterator[TokenBatch]:
    """Fresh responses; a call draws for several updates, always for the same ones together."""
    block, place = divmod(start, DRAWN_TOGETHER)
    while True:
        size = DRAWN_TOGETHER * rows
        numbers = Order(key.fold("order"), len(prompts), block * size).take(size)
        pairs = pairs_of(teacher([prompts[n] for n in numbers], key.fold("teacher", block)))
        for update in range(place, DRAWN_TOGETHER):
            yield rows_of(pairs[update * rows : (update + 1) * rows])
        block, place = block + 1, 0
