"""A reward of parts: the weighted sum, scales frozen on reference samples, lengths, ensembles."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reward_groups import group
from torch import Tensor

from cabochon.core import Group
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.rewards.compose import (
    Composition,
    Part,
    Scale,
    ensemble,
    frozen,
    load_scales,
    rescaled,
    save_scales,
)
from cabochon.rewards.deadlines import Overdue, within
from cabochon.rewards.lengths import excess, length, repetition
from cabochon.rewards.scores import scores

GROUPS = [group("p", "abcd", "ab"), group("q", "aaaaaaaa", "abcdef")]


def test_lengths_count_tokens() -> None:
    assert length(GROUPS).tolist() == [[4.0, 2.0], [8.0, 6.0]]
    assert excess(4)(GROUPS).tolist() == [[0.0, 0.0], [-1.0, -0.5]]
    with pytest.raises(ConfigError, match="at least 1"):
        excess(0)


def test_repetition_is_the_share_of_n_grams_seen_before() -> None:
    # aaaaaaaa has seven bigrams, of which six were there before; abcdef has no repeated one.
    found = repetition(2)(GROUPS)
    assert found[1].tolist() == pytest.approx([-6 / 7, 0.0])
    assert repetition(4)([group("p", "ab")]).tolist() == [[0.0]]


def test_a_composition_is_the_weighted_sum_of_its_scaled_parts() -> None:
    reward = Composition(
        parts=(
            Part(name="length", reward=length, weight=2.0, scale=Scale(mean=5.0, std=2.0)),
            Part(name="excess", reward=excess(4), weight=-1.0),
        )
    )
    found = scores(reward, GROUPS)
    assert found.total.tolist() == [[-1.0, -3.0], [3.0 + 1.0, 1.0 + 0.5]]
    assert found.parts["length"].tolist() == length(GROUPS).tolist()
    assert torch.equal(reward(GROUPS), found.total)


def test_frozen_scales_make_the_reference_standard_and_stay(tmp_path: Path) -> None:
    reward = frozen(Composition(parts=(Part(name="length", reward=length, weight=0.5),)), GROUPS)
    found = reward(GROUPS).double()
    assert found.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert found.std().item() == pytest.approx(0.5)
    save_scales(reward, tmp_path / "scales.json")
    plain = Composition(parts=(Part(name="length", reward=length, weight=0.5),))
    again = rescaled(plain, load_scales(tmp_path / "scales.json"))
    assert torch.equal(again(GROUPS), reward(GROUPS))
    longer = [group("p", "a" * 100, "b")]
    assert torch.equal(again(longer), reward(longer))  # whatever comes, the scale is the same


def test_scales_of_another_reward_and_a_constant_part_are_refused(tmp_path: Path) -> None:
    constant = Composition(parts=(Part(name="none", reward=excess(1000)),))
    with pytest.raises(DataError, match="none gives 0 to all 4 reference samples"):
        frozen(constant, GROUPS)
    save_scales(constant, tmp_path / "scales.json")
    with pytest.raises(DataError, match=r"\['length'\].*\['none'\]"):
        rescaled(
            Composition(parts=(Part(name="length", reward=length),)),
            load_scales(tmp_path / "scales.json"),
        )
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no scales"):
        load_scales(tmp_path / "other.json")


def test_parts_need_names_of_their_own() -> None:
    part = Part(name="length", reward=length)
    for parts in ((), (part, part)):
        with pytest.raises(ConfigError, match="a name of its own"):
            Composition(parts=parts)


def test_a_part_that_is_no_number_is_named_with_its_sample() -> None:
    def broken(groups: Sequence[Group], /) -> Tensor:
        return length(groups).masked_fill(length(groups) == 6.0, float("nan"))

    reward = Composition(parts=(Part(name="mine", reward=broken), Part(name="n", reward=length)))
    with pytest.raises(NonFinite, match=r"the reward mine gave nan for prompt 1 .*sample 1"):
        scores(reward, GROUPS)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    reward = ensemble({"a": length, "b": excess(4)})
    assert torch.equal(reward(GROUPS), (length(GROUPS) + excess(4)(GROUPS)) / 2)


def test_a_shift_of_one_member_moves_no_order_once_scales_are_frozen() -> None:
    shifted = ensemble({"a": length, "b": lambda groups: 100.0 + 3.0 * excess(4)(groups)})
    plain = ensemble({"a": length, "b": excess(4)})
    torch.testing.assert_close(frozen(shifted, GROUPS)(GROUPS), frozen(plain, GROUPS)(GROUPS))


def test_a_call_that_hangs_is_left_also_outside_the_main_thread() -> None:
    caught: list[BaseException] = []
    gate = threading.Event()

    def run() -> None:
        try:
            within(0.05, gate.wait)
        except Overdue as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    gate.set()
    assert len(caught) == 1
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
