"""Ranks of completions, equals and their order, and what a policy wrote among an anchor's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cabochon.core import Completion, Group
from cabochon.core.errors import DataError
from cabochon.rewards.comparison import compared, paired
from cabochon.rewards.experience import Experience
from cabochon.rewards.ranks import ranks
from cabochon.rewards.scores import Scores


def group(prompt: Sequence[int], *texts: Sequence[int]) -> Group:
    return Group(
        prompt=torch.tensor(prompt),
        completions=tuple(
            Completion(
                tokens=torch.tensor(text),
                logprob=torch.full((len(text),), -1.5),
                model_logprob=torch.full((len(text),), -2.0),
                stopped=True,
            )
            for text in texts
        ),
    )


def experience(
    groups: Sequence[Group], rewards: object, writer: str, number: int = 0
) -> Experience:
    return Experience(
        number=number, groups=tuple(groups), scores=Scores(total=torch.tensor(rewards)), version=0,
        writer=writer,
    )  # fmt: skip


OWN = [group([7, 8], [1], [2, 2]), group([9], [1], [3])]
OTHERS = [group([7, 8], [2, 2], [4], [1]), group([9], [5], [3], [6])]


def test_ranks_are_among_all_writers_of_a_prompt_and_equals_share_one() -> None:
    mine = torch.tensor([[0.5, -1.0], [2.0, 2.0]])
    theirs = torch.tensor([[-1.0, 3.0, 0.5], [2.0, 7.0, -4.0]])
    found = ranks([(OWN, mine), (OTHERS, theirs)])
    assert found[0].tolist() == [[1, 0], [1, 1]]
    assert found[1].tolist() == [[0, 2, 1], [1, 2, 0]]
    moved = ranks([(OWN, (3 * mine).exp() + 7), (OTHERS, (3 * theirs).exp() + 7)])
    assert all(torch.equal(a, b) for a, b in zip(found, moved, strict=True))


def test_a_hash_orders_equals_the_same_everywhere_and_never_against_the_reward() -> None:
    flat = torch.zeros(2, 2), torch.zeros(2, 3)
    found = ranks([(OWN, flat[0]), (OTHERS, flat[1])], "hash")
    # The prompts have 3 and 4 different texts; the same text has the same rank for both writers.
    assert [sorted({*a, *b}) for a, b in zip(*(x.tolist() for x in found), strict=True)] == [
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    assert found[0][0, 0] == found[1][0, 2]
    assert found[0][1, 1] == found[1][1, 1]
    alone = ranks([(OWN[1:], flat[0][1:]), (OTHERS[1:], flat[1][1:])], "hash")
    assert torch.equal(alone[0], found[0][1:])
    uneven = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    kept = ranks([(OWN, uneven), (OTHERS, flat[1])], "hash")
    assert kept[0][0, 1] == max(kept[1][0].max(), kept[0][0, 0]) + 1


def test_the_hash_prefers_no_text_everywhere() -> None:
    """Two texts after 400 prompts: each wins about half of the time."""
    groups = [group([n], [1], [2]) for n in range(400)]
    (found,) = ranks([(groups, torch.zeros(400, 2))], "hash")
    assert 160 < int((found[:, 0] == 1).sum()) < 240


def test_writers_of_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="writers' prompts 0 differ"):
        ranks([(OWN, torch.zeros(2, 2)), (OTHERS[::-1], torch.zeros(2, 3))])
    with pytest.raises(DataError, match=r"\[1, 2\] prompts"):
        ranks([(OWN, torch.zeros(2, 2)), (OTHERS[:1], torch.zeros(1, 3))])
    with pytest.raises(DataError, match="2 completions have rewards"):
        ranks([(OWN, torch.zeros(2, 3))])


def test_a_comparison_counts_the_anchors_draws_and_keeps_its_best() -> None:
    own = experience(OWN, [[0.5, -1.0], [2.0, 2.5]], "policy")
    others = experience(OTHERS, [[-1.0, 3.0, 0.5], [2.0, 2.0, 9.0]], "anchor")
    found = compared(own, others, best_of=2, ties="equal", device=torch.device("cpu"))
    assert found.at_most.tolist() == [[2, 1], [2, 2]]
    assert found.below.tolist() == [[1, 0], [0, 2]]
    assert [g.completions[-1].tokens.tolist() for g in found.groups] == [
        [4],
        [5],
    ]  # first of equals
    assert found.rewards.tolist() == [[0.5, -1.0, 3.0], [2.0, 2.5, 2.0]]
    assert found.report["quantile"].item() == pytest.approx((2 + 1 + 2 + 2) / 2 / 3)
    assert found.report["sum_silent"].item() == 0.0
    rows = found.rows("cpu")
    assert rows.own.tolist() == [True, True, False] * 2
    assert rows.recorded[2].abs().sum() == 0.0
    assert rows.batch.mask.sum(1).tolist() == [1, 2, 1, 1, 1, 1]


def test_prompts_of_equal_rewards_are_counted() -> None:
    own = experience(OWN, [[1.0, 1.0], [1.0, 0.0]], "policy")
    others = experience(OTHERS, [[1.0] * 3, [1.0] * 3], "anchor")
    device = torch.device("cpu")
    assert compared(own, others, best_of=3, ties="equal", device=device).report["sum_silent"] == 1
    assert compared(own, others, best_of=3, ties="hash", device=device).report["sum_silent"] == 0


def test_pairs_are_of_one_micro_batch_and_a_lonely_last_one_is_left() -> None:
    def source(*writers: tuple[str, int]):
        for writer, number in writers:
            groups = OWN if writer == "policy" else OTHERS
            yield experience(groups, [[0.0] * len(g.completions) for g in groups], writer, number)

    whole = [("policy", 3), ("anchor", 3), ("policy", 4)]
    assert [a.number for a, _ in paired(source(*whole), 2, 3)] == [3]
    for wrong in ([("anchor", 0), ("policy", 0)], [("policy", 0), ("anchor", 1)]):
        with pytest.raises(DataError, match="replay what was recorded with the same settings"):
            list(paired(source(*wrong), 2, 3))
    with pytest.raises(DataError, match="samples"):
        list(paired(source(*whole), 2, 2))
