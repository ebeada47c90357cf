"""Whatever a reward does wrong surfaces with its prompt and its sample."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cabochon.core import Completion, Group
from cabochon.core.errors import DataError, NonFinite
from cabochon.rewards.scores import Scores, scores


def completion(*tokens: int) -> Completion:
    logprob = torch.zeros(len(tokens))
    return Completion(
        tokens=torch.tensor(tokens), logprob=logprob, model_logprob=logprob, stopped=True
    )


GROUPS = [
    Group(prompt=torch.tensor([1, 2]), completions=(completion(3), completion(4, 5))),
    Group(prompt=torch.tensor([7]), completions=(completion(6, 6, 6), completion(9))),
]


def lengths(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([[len(each.tokens) for each in group.completions] for group in groups])


class Parts:
    def __call__(self, groups: Sequence[Group]) -> Tensor:
        return self.scores(groups).total

    def scores(self, groups: Sequence[Group]) -> Scores:
        said = lengths(groups).float()
        return Scores(total=2 * said, parts={"length": said})


def test_a_plain_function_has_a_total_and_no_parts() -> None:
    found = scores(lengths, GROUPS)
    assert found.total.tolist() == [[1.0, 2.0], [3.0, 1.0]]
    assert found.total.dtype == torch.float32
    assert not found.parts


def test_a_reward_of_parts_tells_them() -> None:
    found = scores(Parts(), GROUPS)
    assert torch.equal(found.total, 2 * found.parts["length"])


def test_an_error_of_the_reward_names_the_prompt_and_the_sample() -> None:
    def breaks(groups: Sequence[Group]) -> Tensor:
        return torch.tensor([[1 / (9 - int(c.tokens[0])) for c in g.completions] for g in groups])

    with pytest.raises(DataError, match=r"prompt 1 .*sample 1 .*ZeroDivisionError"):
        scores(breaks, GROUPS)


def test_a_wrong_count_is_told() -> None:
    with pytest.raises(DataError, match=r"\(2, 1\), expected a tensor of shape \(2, 2\)"):
        scores(lambda groups: lengths(groups)[:, :1], GROUPS)
    with pytest.raises(DataError, match=r"list, expected a tensor"):
        scores(lambda groups: [1.0, 2.0], GROUPS)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_names_the_sample(value: float) -> None:
    def broken(groups: Sequence[Group]) -> Tensor:
        return lengths(groups).float().masked_fill(lengths(groups) == 2, value)

    with pytest.raises(NonFinite, match=r"prompt 0 .*sample 1 \(token ids 4 5\)"):
        scores(broken, GROUPS)


def test_groups_of_different_sizes_are_refused() -> None:
    uneven = [GROUPS[0], Group(prompt=torch.tensor([7]), completions=(completion(1),))]
    with pytest.raises(DataError, match=r"\[1, 2\] completions"):
        scores(lengths, uneven)
