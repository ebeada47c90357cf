"""What a dataset's episodes consist of, as `features.json` of TensorFlow Datasets says it.

A specification is a tree of features. Where one is not given it is inferred from an episode, so
that nothing is lost: doubles, which the files' lists of floats would round, are stored as bytes;
pictures (H W C uint8) become PNG; other bytes are deflated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import DataError
from cabochon.data.rlds.records import FLAGS, Episode, Ragged

__all__ = ["Array", "Feature", "Image", "Label", "Rows", "Spec", "Text", "infer", "leaf_features"]

Encoding = Literal["none", "bytes", "zlib"]

_CLASS = "tensorflow_datasets.core.features."
_SMALLEST_PICTURE = 8
_NUMBERS = (
    *("bool", "float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


@dataclass(frozen=True, kw_only=True)
class Array:
    """Numbers, or strings of bytes (dtype `string`)."""

    dtype: str
    shape: tuple[int | None, ...] = ()
    """Of one step, or of the metadata. None, at most once and only in metadata: any length."""
    encoding: Encoding = "none"
    """`none` is a list of numbers; `bytes` and `zlib` are the array's memory, little-endian."""

    def __post_init__(self) -> None:
        if self.dtype not in (*_NUMBERS, "string"):
            raise DataError(f"dtype {self.dtype} is not one of string, {', '.join(_NUMBERS)}")
        if self.encoding not in get_args(Encoding) or (
            self.dtype == "string" and self.encoding != "none"
        ):
            raise DataError(f"encoding {self.encoding!r} of {self.dtype} is not known")


@dataclass(frozen=True, kw_only=True)
class Text:
    """UTF-8."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture of bytes, stored as a PNG or JPEG file."""

    shape: tuple[int | None, ...]
    """H W C; None where pictures differ."""
    format: str = "png"
    """`png` loses nothing. `jpeg` is read; to write it, give the files' bytes."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """One of so many classes, int64."""

    classes: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A list in every step (or in the metadata): ragged unless its length is fixed."""

    feature: Feature
    length: int | None = None


Feature = Array | Text | Image | Label | Rows


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The features of a dataset's steps and of its episodes' metadata."""

    steps: Mapping[str, Any]
    """Name -> feature, or a mapping of such."""
    metadata: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of `features.json`."""
        steps = _sequence(_tree_json(self.steps), "dataset_feature.Dataset", None)
        content = _tree_json(self.metadata)
        content["featuresDict"]["features"]["steps"] = steps
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Spec:
        """From the content of `features.json`.

        Raises:
            DataError: it is no such file, has no steps, or has a feature of an unknown kind.
        """
        try:
            features = dict(content["featuresDict"]["features"])
            steps = features.pop("steps")["sequence"]["feature"]
            return Spec(
                steps=_tree(steps, "steps"),
                metadata={name: _feature(each, name) for name, each in features.items()},
            )
        except DataError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"this is not the features.json of an RLDS dataset ({what}): expected a "
                "dictionary of features with a sequence called `steps`"
            ) from None

    @staticmethod
    def of(episode: Episode) -> Spec:
        """Inferred from an episode, so that every episode like it can be stored without loss."""
        missing = [name for name in FLAGS[:2] if name not in episode.steps]
        if missing:
            raise DataError(f"the steps have no {' and no '.join(missing)}; RLDS requires them")
        return Spec(
            steps=_inferred(episode.steps, "steps", True),
            metadata=_inferred(episode.metadata, "metadata", False),
        )


def leaf_features(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Feature]:
    """{"a": {"b": feature}} -> {"a/b": feature}."""
    leaves: dict[str, Feature] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= leaf_features(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def infer(column: Any, name: str, *, stepwise: bool) -> Feature:
    """The feature in which a column (or a value of the metadata) is stored without loss."""
    if isinstance(column, Ragged):
        inner: Feature = infer(column.values, name, stepwise=True)
        return Rows(feature=inner)
    if isinstance(column, str):
        return Text()
    if isinstance(column, bytes):
        return Array(dtype="string")
    array: NDArray[Any] = np.asarray(column)
    shape = array.shape[1:] if stepwise else array.shape
    if array.dtype == object or array.dtype.kind in "US":
        return _of_objects(array, name, shape, stepwise)
    channels = shape[2] if array.dtype == np.uint8 and len(shape) == 3 else 0
    if channels in (1, 3, 4) and min(shape[:2]) >= _SMALLEST_PICTURE:
        return Image(shape=shape)
    encoding: Encoding = "none"
    if array.dtype == np.float64:
        encoding = "bytes"
    elif array.dtype == np.uint8 and shape:
        encoding = "zlib"
    dtype = array.dtype.name
    if dtype not in _NUMBERS:
        raise DataError(f"{name} has dtype {dtype}, which the format cannot hold")
    flexible = shape if stepwise or not shape else (None, *shape[1:])
    return Array(dtype=dtype, shape=flexible, encoding=encoding)


def _of_objects(array: NDArray[Any], name: str, shape: tuple[int, ...], stepwise: bool) -> Feature:
    kinds = {type(value) for value in array.ravel().tolist()}
    if kinds <= {str} and (stepwise and not shape):
        return Text()
    if kinds <= {str, bytes} and len(kinds) <= 1:
        flexible: tuple[int | None, ...] = shape if stepwise else (None, *shape[1:])
        return Array(dtype="string", shape=flexible)
    found = sorted(kind.__name__ for kind in kinds)
    raise DataError(f"{name} holds {', '.join(found)}; a column is numbers, or text, or bytes")


def _inferred(tree: Mapping[str, Any], path: str, stepwise: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if "/" in name or not name:
            raise DataError(f"{path}: the name {name!r} may not contain `/` nor be empty")
        below = f"{path}/{name}"
        found[name] = (
            _inferred(value, below, stepwise)
            if isinstance(value, Mapping)
            else infer(value, below, stepwise=stepwise)
        )
    return found


def _tree_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    features = {
        name: _tree_json(value) if isinstance(value, Mapping) else _json(value)
        for name, value in tree.items()
    }
    return {
        "pythonClassName": _CLASS + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _json(feature: Feature) -> dict[str, Any]:
    match feature:
        case Array():
            kind, content = "tensor_feature.Tensor", {"tensor": {
                "shape": _shape_json(feature.shape),
                "dtype": feature.dtype,
                "encoding": feature.encoding,
            }}  # fmt: skip
        case Text():
            kind, content = "text_feature.Text", {"text": {}}
        case Image():
            kind, content = "image_feature.Image", {"image": {
                "shape": _shape_json(feature.shape),
                "dtype": "uint8",
                "encodingFormat": feature.format,
            }}  # fmt: skip
        case Label():
            kind = "class_label_feature.ClassLabel"
            content = {"classLabel": {"numClasses": str(feature.classes)}}
        case Rows():
            return _sequence(_json(feature.feature), "sequence_feature.Sequence", feature.length)
    return {"pythonClassName": _CLASS + kind, **content}


def _sequence(inner: dict[str, Any], kind: str, length: int | None) -> dict[str, Any]:
    content = {"feature": inner, "length": str(-1 if length is None else length)}
    return {"pythonClassName": _CLASS + kind, "sequence": content}


def _shape_json(shape: tuple[int | None, ...]) -> dict[str, Any]:
    return {"dimensions": [str(-1 if size is None else size) for size in shape]} if shape else {}


def _tree(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    features = content["featuresDict"]["features"]
    return {name: _feature(each, f"{path}/{name}") for name, each in features.items()}


def _feature(content: Mapping[str, Any], path: str) -> Any:
    if "featuresDict" in content:
        return _tree(content, path)
    if "sequence" in content:
        inner = _feature(content["sequence"]["feature"], path)
        length = int(content["sequence"].get("length", -1))
        return _in_rows(inner, None if length < 0 else length)
    if "tensor" in content:
        tensor = content["tensor"]
        dtype = "string" if tensor["dtype"] in {"object", "str"} else tensor["dtype"]
        encoding: Encoding = tensor.get("encoding") or "none"
        return Array(dtype=dtype, shape=_shape(tensor), encoding=encoding)
    if "text" in content:
        return Text()
    if "image" in content:
        image = content["image"]
        if image.get("dtype", "uint8") != "uint8":
            raise DataError(f"{path} is a picture of {image['dtype']}; only uint8 can be read")
        return Image(shape=_shape(image), format=image.get("encodingFormat") or "png")
    if "classLabel" in content:
        return Label(classes=int(content["classLabel"].get("numClasses", 0)))
    kind = str(content.get("pythonClassName", "of no name")).rsplit(".", 1)[-1]
    known = "FeaturesDict, Sequence, Dataset, Tensor, Scalar, Text, Image and ClassLabel"
    raise DataError(f"{path} is a feature {kind}, which cannot be read; known are {known}")


def _in_rows(inner: Any, length: int | None) -> Any:
    """A sequence of a dictionary is stored as a dictionary of sequences."""
    if isinstance(inner, Mapping):
        return {name: _in_rows(each, length) for name, each in inner.items()}
    return Rows(feature=inner, length=length)


def _shape(content: Mapping[str, Any]) -> tuple[int | None, ...]:
    sizes = [int(size) for size in content.get("shape", {}).get("dimensions", [])]
    return tuple(None if size < 0 else size for size in sizes)
