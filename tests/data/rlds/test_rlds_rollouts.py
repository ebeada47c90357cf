"""Language rollouts on the disk: every number comes back as it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_episodes import needs
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.core.types import Completion, Group
from cabochon.data.rlds.reader import Episodes, validate
from cabochon.data.rlds.rollouts import (
    Rollout,
    episodes_of,
    open_rollouts,
    read_rollouts,
    rollouts_of,
    write_rollouts,
)
from cabochon.data.rlds.shards import FORMATS, ShardFormat


def rollout(number: int, *, samples: int = 3, scored: bool = True) -> Rollout:
    draw = torch.Generator().manual_seed(number)

    def numbers(count: int) -> Tensor:
        return torch.randn(count, generator=draw)

    lengths = [int(n) for n in torch.randint(1, 7, (samples,), generator=draw)]
    completions = tuple(
        Completion(
            tokens=torch.randint(0, 2**31, (length,), generator=draw),
            logprob=-numbers(length).abs(),
            model_logprob=-numbers(length).abs() * 1e-30,
            stopped=length % 2 == 0,
        )
        for length in lengths
    )
    return Rollout(
        number=number,
        group=Group(prompt=torch.arange(number % 4), completions=completions),
        versions=tuple(torch.randint(0, 9, (length,), generator=draw) for length in lengths),
        rewards=numbers(samples) if scored else None,
        parts={"length": numbers(samples), "http://h/%2F 50%": numbers(samples).double() / 3},
    )


def assert_same(found: Rollout, wanted: Rollout) -> None:
    def tensors(each: Rollout) -> dict[str, Tensor]:
        named = {"prompt": each.group.prompt, **each.parts}
        for number, completion in enumerate(each.group.completions):
            named |= {f"tokens {number}": completion.tokens, f"draw {number}": completion.logprob}
            named[f"model {number}"] = completion.model_logprob
            named[f"version {number}"] = each.versions[number]
        return named if each.rewards is None else {"rewards": each.rewards, **named}

    left, right = tensors(found), tensors(wanted)
    assert left.keys() == right.keys()
    for name in right:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].numpy().tobytes() == right[name].numpy().tobytes(), name
    assert [each.stopped for each in found.group.completions] == [
        each.stopped for each in wanted.group.completions
    ]
    assert found.number == wanted.number


@pytest.mark.parametrize("format", FORMATS)
def test_rollouts_come_back_from_the_disk_bit_for_bit(tmp_path: Path, format: ShardFormat) -> None:
    needs(format)
    rollouts = [rollout(n, samples=1 + n % 3, scored=n % 2 == 0) for n in range(6)]
    with open_rollouts(tmp_path, tokenizer="abc", format=format) as writer:
        write_rollouts(writer, rollouts[:4])
    with open_rollouts(tmp_path, tokenizer="abc", append=True) as writer:
        write_rollouts(writer, rollouts[4:])
    found = list(read_rollouts(tmp_path))
    for one, other in zip(found, rollouts, strict=True):
        assert_same(one, other)
    assert list(validate(tmp_path)) == []
    assert Episodes(tmp_path).notes == {"kind": "language rollouts", "tokenizer": "abc"}
    with pytest.raises(DataError, match="is noted as"):
        open_rollouts(tmp_path, tokenizer="another", append=True)


def test_a_completion_is_an_episode_of_tokens() -> None:
    """T tokens are T transitions; the reward comes with the last; a limit is no end."""
    group = Group(
        prompt=torch.tensor([5, 6]),
        completions=(
            Completion(
                tokens=torch.tensor([7, 8, 1]),
                logprob=torch.tensor([-1.0, -2.0, -3.0]),
                model_logprob=torch.tensor([-1.5, -2.5, -3.5]),
                stopped=True,
            ),
            Completion(
                tokens=torch.tensor([9]),
                logprob=torch.tensor([-1.0]),
                model_logprob=torch.tensor([-1.0]),
                stopped=False,
            ),
        ),
    )
    stopped, cut = episodes_of(
        Rollout(
            number=4,
            group=group,
            versions=(torch.tensor([2, 2, 3]), torch.tensor([3])),
            rewards=torch.tensor([0.5, -1.0]),
        )
    )
    assert stopped.steps["observation"]["token"].tolist() == [6, 7, 8, 1]
    assert stopped.steps["action"].tolist() == [7, 8, 1, 0]
    assert stopped.steps["reward"].tolist() == [0.0, 0.0, 0.5, 0.0]
    assert stopped.steps["discount"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert stopped.steps["weights_version"].tolist() == [2, 2, 3, 0]
    assert stopped.terminated
    assert stopped.total_reward() == 0.5
    assert not cut.terminated
    assert cut.steps["discount"].tolist() == [1.0, 0.0]
    assert cut.metadata["prompt"].tolist() == [5, 6]


def test_what_would_lose_is_refused() -> None:
    good = rollout(1)
    doubled = replace(good, rewards=torch.zeros(3, dtype=torch.float64))
    with pytest.raises(DataError, match=r"rewards is torch.float64 \(3,\), expected torch.float32"):
        episodes_of(doubled)
    with pytest.raises(DataError, match="3 completions, but versions of 0"):
        episodes_of(replace(good, versions=()))
    empty = Completion(
        tokens=torch.zeros(0, dtype=torch.int64),
        logprob=torch.zeros(0),
        model_logprob=torch.zeros(0),
        stopped=False,
    )
    group = Group(prompt=good.group.prompt, completions=(empty,))
    with pytest.raises(DataError, match="has no token"):
        episodes_of(replace(good, group=group, versions=(empty.tokens,), rewards=None, parts={}))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_group_of_which_an_episode_is_missing_is_an_error_or_left_out(missing: int) -> None:
    wanted = [rollout(n) for n in range(3)]
    episodes = [episode for each in wanted for episode in episodes_of(each)]
    del episodes[3 + missing]
    with pytest.raises(DataError, match="prompt 1 has the completions"):
        list(rollouts_of(episodes))
    found = list(rollouts_of(episodes, skip_incomplete=True))
    assert [each.number for each in found] == [0, 2]
    assert_same(found[1], wanted[2])


def test_the_halves_of_two_groups_are_not_taken_for_one() -> None:
    one, other = episodes_of(rollout(1)), episodes_of(rollout(2))
    assert list(rollouts_of([*one[:2], other[2]], skip_incomplete=True)) == []


def test_other_episodes_are_no_rollouts() -> None:
    episode = episodes_of(rollout(1))[0]
    stripped = replace(episode, metadata={"episode_id": "x"})
    with pytest.raises(DataError, match="no language rollout"):
        list(rollouts_of([stripped]))
    assert np.isfinite(episode.total_reward())
