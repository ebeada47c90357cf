"""Groups of tokens that two tokenizers make of the same bytes.

Where both have a boundary at the same byte, the text before it and after it can be compared; what
lies between two such boundaries is a group. By the chain rule a model's probability of a group is
the product of the probabilities of its tokens, each behind all before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

__all__ = ["Atoms", "aligned", "common_length", "utf8_skip"]

Atoms = Sequence[int]
"""What a token stands for: its bytes, or for a control token one number above 255."""


def aligned(
    mine: Sequence[Atoms], theirs: Sequence[Atoms], *, skip: int = 0
) -> list[tuple[range, range]]:
    """The smallest groups of tokens that cover the same atoms, in order.

    Args:
        mine: the tokens of one sequence.
        theirs: those of another. From the first atom on that differs nothing is compared.
        skip: so many atoms at the beginning of mine are not in theirs.

    Returns:
        For each group the places of its tokens in mine and in theirs.
    """
    my_ends = list(accumulate(map(len, mine)))
    their_ends = list(accumulate(map(len, theirs), initial=skip))[1:]
    whole = list(chain.from_iterable(mine))[skip:]
    agree = skip + common_length(whole, list(chain.from_iterable(theirs)))
    common = sorted({end for end in {*my_ends} & {*their_ends} if end <= agree})
    if skip == 0 or skip in my_ends:
        common = [skip, *(end for end in common if end > skip)]
    return [
        (
            range(bisect_right(my_ends, begin), bisect_right(my_ends, end)),
            range(bisect_right(their_ends, begin), bisect_right(their_ends, end)),
        )
        for begin, end in pairwise(common)
    ]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first elements are the same."""
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def utf8_skip(atoms: Atoms) -> int:
    """How many bytes at the beginning are the rest of a character that began before."""
    return next((place for place, each in enumerate(atoms) if not 0x80 <= each < 0xC0), len(atoms))
