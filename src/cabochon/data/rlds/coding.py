"""An episode as the bytes of one record, and back, by its dataset's specification.

Every column is one entry of a `tf.train.Example`, its T steps one behind the other: floats as
float32, integers and bools as int64 (uint64 by its bits), anything else as T strings of bytes.
Rows of different lengths are their values, `KEY/ragged_flat_values`, and the lengths of level i,
`KEY/ragged_row_lengths_i`.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError, MissingExtra
from cabochon.data.rlds.example import Values, decode_example, encode_example
from cabochon.data.rlds.records import Episode, Ragged, flat, nested
from cabochon.data.rlds.spec import Array, Feature, Image, Label, Rows, Spec, Text, leaf_features

__all__ = ["decode_episode", "encode_episode", "is_invalid_record"]

_VALUES, _LENGTHS = "ragged_flat_values", "ragged_row_lengths_"


def encode_episode(spec: Spec, episode: Episode) -> bytes:
    """The bytes of the episode's record.

    Raises:
        DataError: the episode is not of this specification, or would not come back as it is.
    """
    content: dict[str, Any] = {}
    for prefix, tree, features in (
        ("steps/", episode.steps, spec.steps),
        ("", episode.metadata, spec.metadata),
    ):
        leaves, known = flat(tree), leaf_features(features)
        if leaves.keys() != known.keys():
            where = "steps" if prefix else "metadata"
            raise DataError(
                f"the episode's {where} differ from the dataset's: missing "
                f"{sorted(known.keys() - leaves.keys())}, "
                f"surplus {sorted(leaves.keys() - known.keys())}"
            )
        for name, feature in known.items():
            content |= _encoded(f"{prefix}{name}", feature, leaves[name], bool(prefix))
    return encode_example(content)


def decode_episode(spec: Spec, record: bytes, *, images: bool = True) -> Episode:
    """The episode that a record holds.

    Args:
        spec: of its dataset.
        record: the bytes.
        images: decode pictures; otherwise they stay the bytes of their files.

    Raises:
        DataError: the record is not of this specification.
    """
    content = decode_example(record)
    flags = content.get("steps/is_first")
    if flags is None:
        raise DataError("the record has no steps/is_first: it is no episode, or of other features")
    steps = {
        name: _decoded(f"steps/{name}", feature, content, len(flags), images)
        for name, feature in leaf_features(spec.steps).items()
    }
    metadata = {
        name: _one(_decoded(name, feature, content, None, images), feature)
        for name, feature in leaf_features(spec.metadata).items()
    }
    return Episode(steps=nested(steps), metadata=nested(metadata))


def is_invalid_record(record: bytes) -> bool:
    """What the episode's metadata `invalid` says, without decoding the rest."""
    values = decode_example(record, {"invalid"}).get("invalid", [])
    return len(values) > 0 and bool(values[0])


def _encoded(key: str, feature: Feature, column: Any, stepwise: bool) -> dict[str, Any]:
    if isinstance(feature, Rows) and stepwise:
        return _encoded_rows(key, feature, column)
    if isinstance(feature, Rows):
        feature, column = _in_one(feature, column)
    return {key: _values(key, feature, column if stepwise else _alone(column, feature))}


def _encoded_rows(key: str, feature: Rows, column: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    inner: Feature = feature
    level = 0
    while isinstance(inner, Rows):
        if not isinstance(column, Ragged):
            raise DataError(f"{key} is {type(column).__name__}, expected Ragged rows")
        if inner.length is not None and (column.lengths != inner.length).any():
            raise DataError(f"{key} has rows of other lengths than {inner.length}")
        content[f"{key}/{_LENGTHS}{level}"] = column.lengths.astype(np.int64)
        column, inner, level = column.values, inner.feature, level + 1
    return {f"{key}/{_VALUES}": _values(key, inner, column), **content}


def _in_one(feature: Rows, column: Any) -> tuple[Feature, Any]:
    """A plain list in the metadata is stored as an array is whose length is free."""
    if isinstance(feature.feature, Array) and None not in feature.feature.shape:
        shape = (None, *feature.feature.shape)
        encoding = feature.feature.encoding
        if encoding == "none":
            return Array(dtype=feature.feature.dtype, shape=shape), column
    if isinstance(feature.feature, Text):
        return Array(dtype="string", shape=(None,)), column
    raise DataError("metadata can hold lists of plain numbers and texts, no lists beyond")


def _alone(value: Any, feature: Feature) -> Any:
    """A value of the metadata as a column of one row."""
    if isinstance(value, str | bytes):
        column = np.empty(1, object)
        column[0] = value
        return column
    if isinstance(feature, Array) and feature.dtype == "string":
        return np.asarray(value, object)[None]
    return np.asarray(value)[None]


def _values(key: str, feature: Feature, column: Any) -> Any:
    """What an example stores for a column: float32, int64, or strings of bytes."""
    if isinstance(feature, Image):
        return [_picture_bytes(key, feature, value) for value in column]
    array = np.asarray(column)
    if isinstance(feature, Text) or (isinstance(feature, Array) and feature.dtype == "string"):
        if isinstance(feature, Array):
            _check_shape(key, array.shape[1:], feature.shape)
        return [_text_bytes(key, value) for value in array.ravel().tolist()]
    if isinstance(feature, Label):
        feature = Array(dtype="int64")
    assert isinstance(feature, Array)
    if array.dtype.name != feature.dtype:
        raise DataError(f"{key} has dtype {array.dtype}, the dataset has {feature.dtype}")
    _check_shape(key, array.shape[1:], feature.shape)
    if feature.encoding != "none":
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        rows = [np.ascontiguousarray(row).tobytes() for row in little]
        return [zlib.compress(row) for row in rows] if feature.encoding == "zlib" else rows
    if array.dtype.kind == "f":
        return _as_float32(key, array)
    return (array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int64)).ravel()


def _as_float32(key: str, array: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32)
    if array.dtype == np.float64 and not np.array_equal(rounded, array, equal_nan=True):
        raise DataError(
            f"{key} is float64 and does not fit into the float32 that encoding `none` stores; "
            "give the feature encoding `bytes`, or round the values yourself"
        )
    return rounded.ravel()


def _check_shape(key: str, found: tuple[int, ...], wanted: tuple[int | None, ...]) -> None:
    fits = len(found) == len(wanted) and all(
        want in (None, have) for have, want in zip(found, wanted, strict=True)
    )
    if not fits:
        raise DataError(f"{key} has shape {found}, the dataset has {wanted}")


def _text_bytes(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        return value
    raise DataError(f"{key} holds {type(value).__name__}, expected text or bytes")


def _decoded(
    key: str, feature: Feature, content: Mapping[str, Values], rows: int | None, images: bool
) -> Any:
    """The column of so many rows; with `rows` None, the one value of the metadata as a row."""
    if isinstance(feature, Rows) and rows is not None:
        return _decoded_rows(key, feature, content, rows, images)
    if isinstance(feature, Rows):
        feature, _ = _in_one(feature, None)
    if key not in content:
        raise DataError(f"the record has no {key}: is features.json that of another dataset?")
    return _column(key, feature, content[key], 1 if rows is None else rows, images)


def _decoded_rows(
    key: str, feature: Rows, content: Mapping[str, Values], rows: int, images: bool
) -> Any:
    levels: list[NDArray[np.int64]] = []
    inner: Feature = feature
    count = rows
    while isinstance(inner, Rows):
        lengths = content.get(f"{key}/{_LENGTHS}{len(levels)}")
        if lengths is None or len(lengths) != count:
            raise DataError(f"{key} does not say how long its {count} rows are")
        levels.append(np.asarray(lengths, np.int64))
        count = int(levels[-1].sum())
        inner = inner.feature
    column = _column(key, inner, content.get(f"{key}/{_VALUES}", []), count, images)
    for lengths in reversed(levels):
        column = Ragged(values=column, lengths=lengths)
    return column


def _column(key: str, feature: Feature, values: Values, rows: int, images: bool) -> Any:
    if isinstance(feature, Image):
        _check_count(key, len(values), rows)
        return _pictures(key, feature, values) if images else _objects(list(values), False)
    if isinstance(feature, Text):
        _check_count(key, len(values), rows)
        return _objects(list(values), True)
    if isinstance(feature, Label):
        feature = Array(dtype="int64")
    assert isinstance(feature, Array)
    size = math.prod(each for each in feature.shape if each is not None)
    if feature.encoding != "none":
        return _from_memory(key, feature, values, rows)
    if None not in feature.shape:
        _check_count(key, len(values), rows * size)
    elif size == 0 or len(values) % (rows * size):
        raise DataError(f"{key} has {len(values)} values, no multiple of {size}")
    shape = (rows, *(-1 if each is None else each for each in feature.shape))
    if feature.dtype == "string":
        return _objects(list(values), False).reshape(shape)
    array = np.asarray(values) if len(values) else np.zeros(0, feature.dtype)
    if len(values) and array.dtype.kind != ("f" if feature.dtype.startswith("f") else "i"):
        raise DataError(f"{key} is stored as {array.dtype}, features.json says {feature.dtype}")
    if feature.dtype == "uint64":
        array = np.ascontiguousarray(array).view(np.uint64)
    return array.astype(feature.dtype).reshape(shape)


def _from_memory(key: str, feature: Array, values: Values, rows: int) -> NDArray[Any]:
    _check_count(key, len(values), rows)
    try:
        raw = [zlib.decompress(v) if feature.encoding == "zlib" else bytes(v) for v in values]
    except zlib.error as error:
        raise DataError(f"{key} cannot be inflated: {error}") from None
    shape = tuple(-1 if each is None else each for each in feature.shape)
    dtype = np.dtype(feature.dtype)
    array = np.frombuffer(b"".join(raw), dtype.newbyteorder("<")).astype(dtype)
    if -1 not in shape:
        _check_count(key, len(array), rows * math.prod(shape))
    return array.reshape(rows, *shape)


def _check_count(key: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(f"{key} has {found} values, expected {wanted}; the record is damaged")


def _objects(values: list[Any], text: bool) -> NDArray[Any]:
    column = np.empty(len(values), object)
    column[:] = [bytes(v).decode("utf-8", "surrogateescape") if text else v for v in values]
    return column


def _one(column: Any, feature: Feature) -> Any:
    """The value of a column of one row: texts and numbers as such, arrays as arrays."""
    value = column[0]
    if isinstance(feature, Array) and feature.shape == () and feature.dtype == "string":
        return bytes(value)
    return value


def _picture_bytes(key: str, feature: Image, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if feature.format != "png":
        raise DataError(
            f"{key} is stored as {feature.format}, which loses; give the bytes of the files, "
            "or declare it png"
        )
    array = np.asarray(value)
    _check_shape(key, array.shape, feature.shape)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise DataError(f"{key} is {array.dtype} {array.shape}, expected uint8 H W 1, 3 or 4")
    file = io.BytesIO()
    grey = array[:, :, 0] if array.shape[2] == 1 else array
    _pillow().fromarray(grey).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _pictures(key: str, feature: Image, values: Values) -> NDArray[Any]:
    """T H W C; where the pictures differ in size, an array of objects."""
    pillow, found = _pillow(), []
    for value in values:
        try:
            with pillow.open(io.BytesIO(bytes(value))) as file:
                grey = feature.shape[2] == 1 if len(feature.shape) == 3 else False
                picture = np.array(file.convert("L") if grey and file.mode != "L" else file)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{key} holds a picture that cannot be read: {error}") from None
        picture = picture[:, :, None] if picture.ndim == 2 else picture
        _check_shape(key, picture.shape, feature.shape)
        found.append(picture)
    if len({picture.shape for picture in found}) == 1:
        return np.stack(found)
    column = np.empty(len(found), object)
    column[:] = found
    return column


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise MissingExtra("pillow", "rlds", "reading or writing pictures") from error
    return PIL.Image
