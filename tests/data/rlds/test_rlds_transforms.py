"""Windows, n-step transitions, statistics, patterns, alignment: by hand and by brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_episodes import assert_same, varied_episode

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.rlds.alignment import realigned
from cabochon.data.rlds.datasets import EpisodeDataset, WindowDataset
from cabochon.data.rlds.patterns import Take, pattern_map, steps_of
from cabochon.data.rlds.records import Episode, Ragged, episode_of, step_columns
from cabochon.data.rlds.statistics import mean_and_std
from cabochon.data.rlds.transforms import (
    concat_if_terminal,
    concatenate,
    map_steps,
    shift_keys,
    truncate_after,
    truncated,
)
from cabochon.data.rlds.validation import findings
from cabochon.data.rlds.windows import batch, n_step, window_count, windows


def small(length: int = 4, *, terminated: bool = True) -> Episode:
    """Observation i, action 10 + i and reward 2 ** i at step i."""
    return episode_of(
        observations=np.arange(length + 1, dtype=np.float64),
        actions=10 + np.arange(length),
        rewards=2.0 ** np.arange(length),
        terminated=terminated,
    )


def test_batches_are_those_of_the_reference() -> None:
    """The two examples in the documentation of `rlds.transformations.batch`."""
    items = [1, 2, 3, 4]
    assert list(batch(items, 2, shift=1)) == [[1, 2], [2, 3], [3, 4], [4]]
    assert list(batch(items, 2, shift=1, stride=2)) == [[1, 3], [2, 4], [3], [4]]
    assert list(batch(items, 3)) == [[1, 2, 3], [4]]
    assert list(batch(items, 3, drop_remainder=True)) == [[1, 2, 3]]
    with pytest.raises(ConfigError, match="at least 1"):
        list(batch(items, 0))


@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_a_window_is_every_stride_th_of_size_items_wherever_it_starts(
    length: int, size: int, shift: int, stride: int, drop: bool
) -> None:
    wanted = [
        [at for at in range(start, start + size * stride, stride) if at < length]
        for start in range(0, length, shift)
    ]
    wanted = [each for each in wanted if len(each) == size or not drop]
    options = {"shift": shift, "stride": stride, "drop_remainder": drop}
    assert list(batch(range(length), size, **options)) == wanted
    assert window_count(length, size, **options) == len(wanted)
    if length:
        episode = small(length - 1)
        found = [w["observation"].tolist() for w in windows(episode, size, **options)]
        assert found == wanted


def test_a_batch_holds_no_more_than_a_window() -> None:
    endless = itertools.count()
    assert list(itertools.islice(batch(endless, 2, shift=5, stride=3), 3)) == [
        [0, 3],
        [5, 8],
        [10, 13],
    ]


def test_n_step_transitions_of_a_small_episode_by_hand() -> None:
    """gamma 1/2, rewards 1 2 4 8: R_0 = 1 + 2/2 + 4/4 = 3; the end is terminal."""
    found = n_step(small(), 3, gamma=0.5)
    assert found.reward.tolist() == [3.0, 6.0, 8.0, 8.0]
    assert found.discount.tolist() == [0.125, 0.0, 0.0, 0.0]
    assert found.observation.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found.action.tolist() == [10, 11, 12, 13]
    assert found.next_observation.tolist() == [3.0, 4.0, 4.0, 4.0]
    assert found.steps.tolist() == [3, 3, 2, 1]


def test_an_episode_that_was_cut_short_is_bootstrapped_from_its_final_observation() -> None:
    found = n_step(small(terminated=False), 3, gamma=0.5)
    assert found.discount.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert found.next_observation.tolist() == [3.0, 4.0, 4.0, 4.0]


@given(st.integers(1, 8), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
def test_n_step_equals_the_sum_written_out(
    length: int, n: int, terminated: bool, last_step_valid: bool, data: st.DataObject
) -> None:
    """A discount of 0 within the window stops the sum."""
    discount = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=length, max_size=length)))  # fmt: skip  # noqa: E501
    episode = small(length, terminated=terminated)
    rewards = np.random.default_rng(n).normal(size=length)
    if last_step_valid:
        steps = {
            "observation": np.arange(length, dtype=np.float64),
            "action": np.arange(length),
            "reward": rewards,
            "discount": discount,
            "is_first": np.arange(length) == 0,
            "is_last": np.arange(length) == length - 1,
            "is_terminal": (np.arange(length) == length - 1) & terminated,
        }
    else:
        steps = dict(episode.steps)
        steps |= {"reward": np.append(rewards, 9.0), "discount": np.append(discount, 9.0)}
    found = n_step(replace(episode, steps=steps, last_step_valid=last_step_valid), n, gamma=0.9)
    wanted = []
    for start in range(length):
        total, scale = 0.0, 1.0
        stop = min(start + n, length)
        for at in range(start, stop):
            total += scale * rewards[at]
            scale *= 0.9 * discount[at]
        if stop == length and terminated:
            scale = 0.0
        elif stop == length and last_step_valid:
            continue
        wanted.append((total, scale, stop - start))
    assert found.reward == pytest.approx([each[0] for each in wanted])
    assert found.discount == pytest.approx([each[1] for each in wanted])
    assert found.steps.tolist() == [each[2] for each in wanted]


def test_the_rewards_of_n_steps_and_of_a_whole_episode_agree() -> None:
    episode = small(6)
    assert n_step(episode, 6, gamma=1.0).reward[0] == episode.total_reward() == 63.0


@pytest.mark.parametrize("alignment", ["ARS", "RSA"])
def test_an_alignment_and_back_is_the_same_episode(alignment: str) -> None:
    episode = varied_episode(5)
    there = realigned(episode, alignment)
    assert_same(realigned(there, "SAR"), episode)
    assert there.total_reward() == pytest.approx(episode.total_reward())


def test_in_ars_and_rsa_what_came_before_an_observation_stands_beside_it() -> None:
    episode = small()
    ars, rsa = realigned(episode, "ARS"), realigned(episode, "RSA")
    assert ars.steps["action"].tolist() == [0, 10, 11, 12, 13]
    assert ars.steps["reward"].tolist() == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert rsa.steps["action"].tolist() == [10, 11, 12, 13, 0]
    assert rsa.steps["reward"].tolist() == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert_same(realigned(ars, "RSA"), rsa)
    with pytest.raises(ConfigError, match="alignment must be"):
        realigned(episode, "SRA")  # type: ignore[arg-type]


def test_concatenation_fills_what_one_side_lacks_with_zeros() -> None:
    first = {"a": np.array([1, 2]), "b": {"c": np.ones((2, 3))}}
    second = {"a": np.array([3]), "t": np.array(["x"], object), "r": Ragged.of([np.array([7])])}
    found = concatenate(first, second)
    assert found["a"].tolist() == [1, 2, 3]
    assert found["b"]["c"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert found["t"].tolist() == ["", "", "x"]
    assert [row.tolist() for row in found["r"]] == [[], [], [7]]
    with pytest.raises(DataError, match="a: dtype int64 and float64"):
        concatenate({"a": np.array([1])}, {"a": np.array([1.0])})


def test_absorbing_steps_follow_a_terminal_step_alone() -> None:
    def absorbing(step: dict[str, object]) -> dict[str, object]:
        return step_columns([{**step, "is_last": np.True_, "absorbing": np.True_}])

    found = concat_if_terminal(small(), absorbing)
    assert found["observation"].tolist() == [0, 1, 2, 3, 4, 4]
    assert found["absorbing"].tolist() == [False] * 5 + [True]
    cut = small(terminated=False)
    assert concat_if_terminal(cut, absorbing).keys() == cut.steps.keys()


def test_truncation_includes_the_step_that_fulfils_the_condition() -> None:
    found = truncate_after(small().steps, lambda step: step["observation"] >= 2)
    assert found["observation"].tolist() == [0, 1, 2]
    assert len(truncate_after(small().steps, lambda _: False)["observation"]) == 5


def test_an_episode_that_is_cut_obeys_the_rules_and_is_not_terminal() -> None:
    episode = varied_episode(5)
    for count in range(6):
        cut = truncated(episode, count)
        assert list(findings(cut)) == []
        assert cut.transitions == count
        assert cut.terminated == (count == 5)
        assert cut.total_reward() == pytest.approx(episode.steps["reward"][:count].sum())


def test_shifting_keys_against_the_others_shortens_the_steps() -> None:
    steps = {"a": np.arange(5), "b": {"c": np.arange(5) * 10, "d": np.arange(5)}}
    later = shift_keys(steps, ("b/c",), 2)
    assert later["a"].tolist() == later["b"]["d"].tolist() == [0, 1, 2]
    assert later["b"]["c"].tolist() == [20, 30, 40]
    earlier = shift_keys(steps, ("b",), -1)
    assert earlier["a"].tolist() == [1, 2, 3, 4]
    assert earlier["b"]["d"].tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="have no x"):
        shift_keys(steps, ("x",), 1)


def test_a_function_of_every_step_may_change_its_keys() -> None:
    found = map_steps(small(2).steps, lambda step: {"twice": step["observation"] * 2})
    assert found["twice"].tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(DataError, match="step 1 differs from step 0 in its keys"):
        map_steps(small(2).steps, lambda step: {"a": 1} if step["is_first"] else {"b": 1})


def test_statistics_are_numpys_over_the_steps_that_mean_something() -> None:
    rng = np.random.default_rng(0)
    episodes = [
        episode_of(
            observations={"x": 1e6 + rng.normal(size=(n + 1, 3))},
            actions=rng.normal(size=(n, 2)),
            rewards=rng.normal(size=n),
            terminated=False,
        )
        for n in (1, 4, 0, 7)
    ]
    found = mean_and_std(iter(episodes))
    for name, rows in (
        ("observation/x", [each.steps["observation"]["x"] for each in episodes]),
        ("action", [each.steps["action"][:-1] for each in episodes]),
        ("reward", [each.steps["reward"][:-1] for each in episodes]),
    ):
        together = np.concatenate(rows)
        assert found[name].mean == pytest.approx(together.mean(axis=0), rel=1e-12)
        assert found[name].std == pytest.approx(together.std(axis=0, ddof=1), rel=1e-9)
        assert found[name].count == len(together)
    assert mean_and_std(realigned(each, "ARS") for each in episodes)["action"].mean == (
        pytest.approx(found["action"].mean)
    )


def test_patterns_reach_back_and_stop_at_the_border_of_an_episode() -> None:
    pattern = {"past": Take("observation", -3, 0), "action": Take("action", -1)}
    found = list(pattern_map(steps_of([small(3), small(2)]), pattern))
    assert [each["past"].tolist() for each in found] == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]
    assert [each["action"] for each in found] == [12, 0, 0]
    across = pattern_map(steps_of([small(3), small(2)]), pattern, across_episodes=True)
    assert [each["past"].tolist() for each in across][2] == [2, 3, 0]
    with pytest.raises(ConfigError, match="counted back"):
        Take("reward", 0)
    with pytest.raises(DataError, match="has no speed"):
        list(pattern_map(steps_of([small()]), {"s": Take("speed", -1)}))


def test_windows_as_a_dataset_of_pytorch_never_cross_episodes() -> None:
    episodes = [small(3), small(0), small(5)]
    dataset = WindowDataset(episodes, 3)
    assert len(dataset) == 2 + 0 + 4  # T + 2 - k each
    found = torch.utils.data.DataLoader(dataset, batch_size=6)
    (loaded,) = list(found)
    assert loaded["observation"].tolist() == [
        [0, 1, 2],
        [1, 2, 3],
        *[[i, i + 1, i + 2] for i in range(4)],
    ]
    assert loaded["is_first"].sum() == 2
    item = EpisodeDataset(episodes)[2]
    assert item["steps"]["reward"].tolist() == [1, 2, 4, 8, 16, 0]
    with pytest.raises(DataError, match="as long as a window"):
        WindowDataset(episodes, 9)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"is_first": np.zeros(5, bool)}, "is_first is True at steps [], expected at step 0"),
        ({"is_first": np.ones(5, bool)}, "is_first is True at steps [0, 1, 2, 3, 4]"),
        ({"is_last": np.arange(5) == 2}, "is_last is True at step 2; 2 steps follow it"),
        ({"is_last": np.zeros(5, bool)}, "the episode has no end"),
        ({"is_terminal": np.ones(5, bool)}, "only the last can be"),
        ({"reward": np.ones(4)}, "the columns differ in length"),
        ({"is_last": np.zeros(5, np.int64)}, "is_last is int64, expected bool"),
        ({"reward": np.array([0, np.nan, 0, 0, 0])}, "reward is not finite in 1 rows, first in 1"),
        ({"action": np.ones(5)}, "the last step's action is not zero"),
    ],
)
def test_every_broken_rule_is_named(changes: dict[str, np.ndarray], finding: str) -> None:
    episode = small()
    broken = replace(episode, steps={**episode.steps, **changes})
    assert any(finding in found for found in findings(broken))
    assert list(findings(episode)) == []


def test_steps_that_differ_are_named() -> None:
    with pytest.raises(DataError, match=r"a: step 1 is float64 \(2,\), step 0 is float64 \(\)"):
        step_columns([{"a": 1.0}, {"a": np.zeros(2)}])
    with pytest.raises(DataError, match=r"differs from step 0 in its keys: \['b'\]"):
        step_columns([{"a": 1.0}, {"a": 1.0, "b": 2}])
    with pytest.raises(DataError, match="observation has 3 rows, expected 4"):
        episode_of(observations=np.zeros(3), actions=np.zeros(3), rewards=np.zeros(3), terminated=True)  # fmt: skip  # noqa: E501
