import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError
from cabochon.data.documents import Document, content_hash
from cabochon.data.splits import is_held_out, split_by_document


@given(texts=st.lists(st.text()), fraction=st.floats(0, 1))
def test_every_document_is_on_one_side_and_duplicates_are_together(texts, fraction):
    documents = [Document(text, str(place)) for place, text in enumerate([*texts, *texts])]
    train, held_out = split_by_document(documents, fraction)
    assert sorted([*train, *held_out], key=lambda each: int(each.source)) == documents
    assert not {each.text for each in train} & {each.text for each in held_out}


@given(text=st.text(), fraction=st.floats(0, 1), salt=st.text(max_size=100))
def test_the_ends_are_nothing_and_everything_and_more_holds_out_the_same(text, fraction, salt):
    assert not is_held_out(text, 0.0, salt=salt)
    assert is_held_out(text, 1.0, salt=salt)
    if is_held_out(text, fraction / 2, salt=salt):
        assert is_held_out(text, fraction, salt=salt)


def test_the_side_of_a_text_never_changes():
    # Fixed here so that a change of the hash, which would mix old runs' sides, cannot go unseen.
    sides = [
        is_held_out(text, 0.5, salt="cabochon") for text in ("a", "b", "c", "d", "e", "f", "é")
    ]
    assert sides == [True, False, True, False, True, False, True]


def test_the_fraction_is_about_what_was_asked(shared_data):
    lines = gzip.decompress((shared_data / "gsm8k" / "train.jsonl.gz").read_bytes()).splitlines()
    documents = [Document(json.loads(line)["question"], "") for line in lines]
    _, held_out = split_by_document(documents, 0.1)
    assert abs(len(held_out) / len(documents) - 0.1) < 0.015
    _, other = split_by_document(documents, 0.1, salt="other")
    both = {each.text for each in held_out} & {each.text for each in other}
    assert len(both) < 0.2 * len(held_out)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(ConfigError, match="must lie in"):
        split_by_document([], fraction)


def test_the_content_hash_sees_texts_and_their_borders_but_not_their_sources():
    one = content_hash([Document("ab", "x"), Document("c", "y")])
    assert one == content_hash([Document("ab", "p"), Document("c", "q")])
    assert one != content_hash([Document("a", "x"), Document("bc", "y")])
    assert one != content_hash([Document("c", "y"), Document("ab", "x")])
