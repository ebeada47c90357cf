"""Stop texts end a completion with the token that completes them, however they are spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_gemma import random_prompts, small_gemma

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.engine import Settings, generate
from cabochon.generation.stopping import at_text

CUTS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def first_end(stops: list[str], pieces: list[bytes]) -> int | None:
    ends = at_text(stops, pieces.__getitem__)
    written = range(1, len(pieces) + 1)
    return next((count for count in written if ends(list(range(count)))), None)


@given(st.text("abé€😀", max_size=12), CUTS, st.lists(st.text("abé€😀", min_size=1, max_size=3)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_first_token_after_which_the_text_holds_a_stop_is_the_last(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    # The text's bytes, cut anywhere: also inside characters, and into tokens without bytes.
    data, pieces = text.encode(), []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    pieces.append(data)
    wanted = [stop.encode() for stop in stops]
    expected = None
    for count in range(1, len(pieces) + 1):
        before = b"".join(pieces[:count])
        if expected is None and any(stop in before for stop in wanted):
            expected = count
    assert first_end(stops, pieces) == expected


def test_a_stop_inside_a_character_that_is_spread_over_tokens() -> None:
    assert first_end(["€"], [b"a\xe2", b"\x82", b"", b"\xac", b"b"]) == 4
    # U+20AC is E2 82 AC: the bytes of another character that shares them do not end anything.
    assert first_end(["€"], [b"\xe2\x82", b"\xad", b"\xac"]) is None


@pytest.mark.parametrize(("stops", "message"), [(["a", ""], "empty"), (["\ud800"], "Unicode")])
def test_texts_that_cannot_end_anything_are_refused(stops: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at_text(stops, lambda _: b"")


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_refused() -> None:
    ends = at_text(["a"], lambda _: None)
    with pytest.raises(DataError, match="token 7 has no bytes of its own"):
        ends([7])


def test_a_completion_ends_where_a_condition_says() -> None:
    model, prompts = small_gemma(), random_prompts(5, 9, 2)
    plain = Settings(max_new_tokens=30)
    free = generate(model, prompts, plain, Key(1), 4)
    alphabet = [bytes([97 + token % 3]) for token in range(100)]
    stops = at_text(["abc", "cc"], alphabet.__getitem__)
    longest = Settings(max_new_tokens=30, ends=(stops, lambda tokens: len(tokens) == 12))
    ended = 0
    for group, other in zip(generate(model, prompts, longest, Key(1), 4), free, strict=True):
        for one, whole in zip(group.completions, other.completions, strict=True):
            tokens = whole.tokens.tolist()
            text = b"".join(alphabet[token] for token in tokens)
            places = [at + len(s) for s in (b"abc", b"cc") if (at := text.find(s)) >= 0]
            assert one.tokens.tolist() == tokens[: min([*places, 12])]
            assert one.stopped
            ended += min([*places, 12]) < 12
    assert ended > 0
    assert replace(longest, ends=()) == plain
