"""What a regime reads: which sequences, in an order that can be entered anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key, TokenBatch
from cabochon.pipelines.regimes import REGIMES, Pool, Regime, batches, responses_drawn

M, K, ROWS = 5, 3, 4


def group(prompt: Tensor, *answers: int) -> Group:
    return Group(
        prompt=prompt,
        completions=tuple(
            Completion(
                tokens=torch.tensor([answer, answer]), logprob=torch.zeros(2),
                model_logprob=torch.zeros(2), stopped=False,
            )
            for answer in answers
        ),
    )  # fmt: skip


POOL = Pool(
    few=[
        group(torch.tensor([1, 10 + n]), *(100 * k + n for k in range(1, K + 1))) for n in range(M)
    ],
    many=[group(torch.tensor([1, 10 + n]), 100 + n) for n in range(K * M)],
)
calls: list[int] = []


def teacher(prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
    """Answers with a number that tells the call and the place in it apart."""
    calls.append(len(prompts))
    return [group(each, key.integer() % 1000 + 1000 * n) for n, each in enumerate(prompts)]


def some(regime: Regime, count: int, start: int = 0) -> list[TokenBatch]:
    found = batches(regime, POOL, teacher, rows=ROWS, key=Key(0), start=start)
    return list(islice(found, count))


def read(regime: Regime, count: int) -> set[tuple[int, int]]:
    """(prompt, response) pairs, by their telling tokens."""
    return {(int(row[1]), int(row[2])) for batch in some(regime, count) for row in batch.tokens}


def test_fixed_regimes_read_all_they_have_and_nothing_else():
    assert read("offline", 20) == {(10 + n, 100 + n) for n in range(M)}
    assert read("diverse", 40) == {(10 + n, 100 * k + n) for n in range(M) for k in range(1, K + 1)}
    assert read("more_prompts", 40) == {(10 + n, 100 + n) for n in range(K * M)}


def test_online_regimes_ask_for_the_same_prompts_as_offline_with_something_new():
    fresh = read("online_teacher", 20)
    assert {prompt for prompt, _ in fresh} == {10 + n for n in range(M)}
    assert len({answer for _, answer in fresh}) == 20 * ROWS
    for batch in some("online_student", 3):
        assert batch.shape == (ROWS, 2)
        assert not batch.mask.any()


def test_only_responses_are_learned():
    for regime in REGIMES[:4]:
        (batch,) = some(regime, 1)
        assert batch.mask.tolist() == [[False, True, True, False]] * ROWS


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("start", [1, 7, 8, 11])
def test_it_goes_on_wherever_it_is_entered(regime: Regime, start: int):
    whole, rest = some(regime, start + 4), some(regime, 4, start)
    for expected, found in zip(whole[start:], rest, strict=True):
        assert torch.equal(expected.tokens, found.tokens)


def test_the_teacher_is_asked_for_several_updates_at_once():
    calls.clear()
    some("online_teacher", 16)
    assert calls == [8 * ROWS] * 2


def test_what_each_regime_asks_for_is_counted():
    counts = [responses_drawn(regime, POOL, rows=ROWS, steps=10) for regime in REGIMES]
    assert counts == [M, K * M, K * M, 10 * ROWS, 10 * ROWS]
