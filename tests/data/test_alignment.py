"""Groups of two cuts of the same bytes, against every pair of cuts of a short text."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from cabochon.data.alignment import aligned, common_length, utf8_skip

TEXT = b"abcdef"


def cuts(text: bytes) -> list[list[bytes]]:
    """Every way to cut it into tokens."""
    found = []
    for marks in product([False, True], repeat=len(text) - 1):
        places = [0, *(at + 1 for at, mark in enumerate(marks) if mark), len(text)]
        found.append([text[a:b] for a, b in pairwise(places)])
    return found


def inner_ends(tokens: list[bytes]) -> set[int]:
    return {len(b"".join(tokens[:n])) for n in range(1, len(tokens))}


def test_groups_of_all_pairs_of_cuts_cover_the_same_bytes_and_are_the_smallest() -> None:
    for mine, theirs in product(cuts(TEXT), repeat=2):
        groups = aligned(mine, theirs)
        spelled = []
        for ours, other in groups:
            one = [mine[place] for place in ours]
            two = [theirs[place] for place in other]
            assert b"".join(one) == b"".join(two) != b""
            assert not inner_ends(one) & inner_ends(two)
            spelled += one
        assert b"".join(spelled) == TEXT
        assert sum(len(ours) for ours, _ in groups) == len(mine)
        assert sum(len(other) for _, other in groups) == len(theirs)


def test_one_cut_is_a_group_a_token() -> None:
    tokens = [b"ab", b"c", b"def"]
    assert aligned(tokens, tokens) == [(range(n, n + 1), range(n, n + 1)) for n in range(3)]


def test_what_differs_and_what_follows_it_is_not_compared() -> None:
    assert aligned([b"ab", b"cd", b"ef"], [b"ab", b"cX", b"ef"]) == [(range(1), range(1))]
    assert aligned([b"ab", b"cd"], [b"abc", b"de"]) == []
    assert aligned([b"ab", b"cd", b"ef"], [b"a", b"b", b"cd"]) == [
        (range(1), range(2)),
        (range(1, 2), range(2, 3)),
    ]


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ([b"ab", b"cd", b"e"], [(range(1, 2), range(2)), (range(2, 3), range(2, 3))]),
        ([b"a", b"bc", b"d", b"e"], [(range(2, 3), range(1, 2)), (range(3, 4), range(2, 3))]),
    ],
)
def test_bytes_that_the_other_does_not_have_are_passed_over(
    mine: list[bytes], expected: list[tuple[range, range]]
) -> None:
    """Whether or not a token of mine ends where theirs begin."""
    assert aligned(mine, [b"c", b"d", b"e"], skip=2) == expected


def test_nothing_has_no_groups() -> None:
    assert aligned([], []) == []
    assert aligned([b"a"], []) == []


def test_the_common_beginning() -> None:
    assert common_length(b"abc", b"abd") == 2
    assert common_length(b"abc", b"abcd") == 3
    assert common_length(b"", b"a") == 0


def test_the_rest_of_a_character_at_the_beginning() -> None:
    assert utf8_skip("\u6f22x".encode()[1:]) == 2
    assert utf8_skip(b"x") == 0
    assert utf8_skip([256, 0x80]) == 0
