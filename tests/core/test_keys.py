"""Keyed randomness: equal names give equal numbers, other names other numbers, everywhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cabochon.core import Key

branch = st.one_of(st.integers(-5, 10**9), st.text(max_size=5))
paths = st.lists(branch, max_size=4).map(tuple)


@given(st.integers(0, 2**40), paths, paths)
def test_streams_are_equal_exactly_when_their_names_are(seed: int, a: tuple, b: tuple) -> None:
    first, second = Key(seed).fold(*a), Key(seed).fold(*b)
    assert (first.integer() == second.integer()) == (a == b)
    assert 0 <= first.integer() < 2**63


def test_a_number_and_its_text_are_different_branches() -> None:
    assert Key(0).fold(1).integer() != Key(0).fold("1").integer()


def test_no_spelling_of_one_branch_is_two_branches() -> None:
    for text in ("a/b", 'a", "b', "a/str:b", "a\\"):
        assert Key(0).fold(text).integer() != Key(0).fold("a", "b").integer()


def test_an_integer_of_any_kind_is_its_value_and_a_fraction_is_refused() -> None:
    assert Key(0).fold(np.int64(3)).integer() == Key(0).fold(3).integer()
    with pytest.raises(TypeError):
        Key(0).fold(1.5).integer()


def test_folding_twice_is_folding_both() -> None:
    assert Key(3).fold("a").fold(4) == Key(3).fold("a", 4)


def test_another_process_draws_the_same_numbers() -> None:
    code = (
        "import torch; from cabochon.core import Key; k = Key(7).fold('draw', 2);"
        "print(k.integer(), torch.rand(1, generator=k.generator()).item(), k.numpy().random())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    key = Key(7).fold("draw", 2)
    here = (key.integer(), torch.rand(1, generator=key.generator()).item(), key.numpy().random())
    assert other.stdout.split() == [str(value) for value in here]


def test_asking_for_a_stream_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=Key(0).generator())
    assert torch.equal(before, torch.get_rng_state())
