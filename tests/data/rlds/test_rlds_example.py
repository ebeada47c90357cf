"""The wire form of an example, beside the library of protocol buffers where that is installed."""

from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cabochon.core.errors import DataError
from cabochon.data.rlds.example import decode_example, encode_example

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
FLOATS = arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32))


@cache
def example_class() -> Any:
    """`tf.train.Example`, declared to the library in the words of its definition."""
    protobuf = pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    del protobuf
    file = descriptor_pb2.FileDescriptorProto(name="example_test.proto", syntax="proto3")
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=3)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(kinds, start=1):
        feature.field.add(
            name=name.lower(), number=number, type=11, label=1, type_name=f".{name}", oneof_index=0
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=11, label=1, type_name=".Feature")
    features.field.add(
        name="feature", number=1, type=11, label=3, type_name=".Features.FeatureEntry"
    )
    file.message_type.add(name="Example").field.add(
        name="features", number=1, type=11, label=1, type_name=".Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


@given(INTEGERS, FLOATS, st.lists(st.binary(max_size=300), max_size=5), st.text(max_size=5))
def test_what_is_encoded_comes_back_bit_for_bit(
    integers: list[int], floats: np.ndarray, strings: list[bytes], name: str
) -> None:
    content = {f"i{name}": np.array(integers, np.int64), "f": floats, "s": strings}
    found = decode_example(encode_example(content))
    assert found.keys() == content.keys()
    assert np.asarray(found[f"i{name}"], np.int64).tolist() == integers
    assert np.asarray(found["f"], np.float32).tobytes() == floats.tobytes()
    assert found["s"] == strings


@given(INTEGERS, FLOATS)
def test_the_library_of_protocol_buffers_reads_and_writes_the_same(
    integers: list[int], floats: np.ndarray
) -> None:
    example = example_class()
    ours = encode_example({"i": np.array(integers, np.int64), "f": floats, "s": [b"x", b""]})
    theirs = example.FromString(ours).features.feature
    assert list(theirs["i"].int64list.value) == integers
    assert np.array(theirs["f"].floatlist.value, np.float32).tobytes() == floats.tobytes()
    assert list(theirs["s"].byteslist.value) == [b"x", b""]
    assert theirs["i"].WhichOneof("kind") == "int64list"  # an empty list is still of its kind
    back = decode_example(example.FromString(ours).SerializeToString())
    assert np.asarray(back["i"], np.int64).tolist() == integers


def test_lists_that_are_not_packed_are_read() -> None:
    """Feature 3: field 1 as separate varints 300 and -1; feature 2: one fixed 1.0."""
    integers = bytes([8, 0xAC, 2, 8, *[255] * 9, 1])
    floats = bytes([0x0D, 0, 0, 0x80, 0x3F])

    def entry(name: bytes, kind: int, content: bytes) -> bytes:
        feature = bytes([kind << 3 | 2, len(content)]) + content
        body = bytes([10, len(name)]) + name + bytes([18, len(feature)]) + feature
        return bytes([10, len(body)]) + body

    features = entry(b"i", 3, integers) + entry(b"f", 2, floats)
    found = decode_example(bytes([10, len(features)]) + features)
    assert np.asarray(found["i"]).tolist() == [300, -1]
    assert np.asarray(found["f"]).tolist() == [1.0]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_example_are_an_error_or_an_example_never_a_crash(noise: bytes) -> None:
    with suppress(DataError):
        decode_example(noise)


def test_every_cut_of_a_real_example_is_an_error() -> None:
    whole = encode_example({"a": np.array([1, 300, -1]), "b": [b"xyz"]})
    for end in range(1, len(whole)):
        with pytest.raises(DataError):
            decode_example(whole[:end])
