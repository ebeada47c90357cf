"""Records as JSON and bytes: how they pass from one process to another, without pickle.

The JSON holds the plain values and says where, among the bytes, the arrays are. What is read back
is equal in value and in type: tuples are tuples, arrays and tensors (bfloat16 too) keep theirs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALIGNMENT", "Bytes", "Payload", "decoded", "encoded", "named", "path_of", "writable"]

ALIGNMENT = 64
"""Of every array among the bytes, so that any type may be read in place."""

KIND = "$"
"""The key that marks what JSON has no word for."""

Bytes = NDArray[np.uint8]


class Payload:
    """The bytes of a record's arrays, each at an aligned place."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Bytes]] = []
        self.size = 0

    def add(self, part: Bytes) -> list[int]:
        """Where this part begins and how long it is."""
        place = self.size
        self.parts.append((place, part))
        self.size = -(-(place + part.size) // ALIGNMENT) * ALIGNMENT
        return [place, part.size]

    def write(self, room: Bytes) -> None:
        """Copy everything into `room`, of at least `size` bytes."""
        for place, part in self.parts:
            room[place : place + part.size] = part


def encoded(record: Any, payload: Payload, share: Callable[[Any], Any]) -> Any:
    """The JSON tree of a record, whose bytes are added to `payload`.

    Args:
        record: see `runtime.protocols`.
        payload: takes the bytes.
        share: from an object that is none of these to a JSON value that stands for it; None if it
            knows none.

    Raises:
        DataError: something in it is no record.
    """
    if record is None or type(record) in (bool, int, float, str):
        return record
    if isinstance(record, np.ndarray):
        return _array("array", record, payload)
    if isinstance(record, np.generic):
        return _array("scalar", np.asarray(record), payload)
    if isinstance(record, bytes):
        return {KIND: "bytes", "at": payload.add(np.frombuffer(record, np.uint8))}
    if isinstance(record, list):
        return [encoded(each, payload, share) for each in record]
    if type(record) is tuple:
        return {KIND: "tuple", "of": [encoded(each, payload, share) for each in record]}
    if isinstance(record, dict):
        if not all(type(key) is str for key in record):
            raise DataError(f"keys of records are of type str, got {list(record)[:8]}")
        tree = {key: encoded(each, payload, share) for key, each in record.items()}
        return {KIND: "dict", "of": tree} if KIND in tree else tree
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = {
            field.name: encoded(getattr(record, field.name), payload, share)
            for field in dataclasses.fields(record)
        }
        return {KIND: "dataclass", "type": path_of(type(record)), "of": fields}
    if "torch" in sys.modules and isinstance(record, sys.modules["torch"].Tensor):
        return _tensor(record, payload)
    shared = share(record)
    if shared is None:
        raise DataError(
            f"{type(record).__module__}.{type(record).__qualname__} is no record; records are "
            "None, bool, int, float, str, bytes, arrays, tensors, dataclasses, lists, tuples and "
            "dicts"
        )
    return {KIND: "shared", "of": shared}


def decoded(tree: Any, payload: Bytes, shared: Callable[[Any], Any]) -> Any:
    """The record that `encoded` made the tree of; its arrays are views of `payload`."""
    if isinstance(tree, list):
        return [decoded(each, payload, shared) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(KIND)
    if kind is None or kind == "dict":
        within = tree if kind is None else tree["of"]
        return {key: decoded(each, payload, shared) for key, each in within.items()}
    if kind == "tuple":
        return tuple(decoded(each, payload, shared) for each in tree["of"])
    if kind == "dataclass":
        fields = {key: decoded(each, payload, shared) for key, each in tree["of"].items()}
        return named(tree["type"])(**fields)
    if kind == "shared":
        return shared(tree["of"])
    place, size = tree["at"]
    part = payload[place : place + size]
    if kind == "bytes":
        return part.tobytes()
    if kind == "tensor":
        return _as_tensor(part, tree["dtype"], tree["shape"])
    array = np.ndarray(tree["shape"], np.dtype(tree["dtype"]), part)
    return array[()] if kind == "scalar" else array


def writable(record: Any) -> Any:
    """The record with copies of those arrays that are for reading alone."""
    if isinstance(record, np.ndarray):
        return record if record.flags.writeable else record.copy()
    if type(record) in (list, tuple):
        return type(record)(writable(each) for each in record)
    if isinstance(record, dict):
        return {key: writable(each) for key, each in record.items()}
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = dataclasses.fields(record)
        return type(record)(**{f.name: writable(getattr(record, f.name)) for f in fields})
    return record


def path_of(thing: Any) -> str:
    """module:name of a function or class, by which another process finds it.

    Raises:
        ConfigError: it cannot be found by that name.
    """
    path = f"{thing.__module__}:{thing.__qualname__}"
    if "<" in path or thing.__module__ == "__main__":
        raise ConfigError(
            f"{path} cannot be found by another process; define it at the top of a module that "
            "can be imported"
        )
    return path


def named(path: str) -> Any:
    """The function or class at module:name.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        thing: Any = import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path} was not found: {error}") from error
    return thing


def _array(kind: str, array: NDArray[Any], payload: Payload) -> dict[str, Any]:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise DataError(f"arrays of records hold numbers, bytes or text, got dtype {array.dtype}")
    flat = np.ascontiguousarray(array).reshape(-1)
    part = flat.view(np.uint8) if flat.nbytes else np.empty(0, np.uint8)
    at = payload.add(part)
    return {KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "at": at}


def _tensor(tensor: Tensor, payload: Payload) -> dict[str, Any]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    part = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    name = str(tensor.dtype).removeprefix("torch.")
    return {KIND: "tensor", "dtype": name, "shape": list(tensor.shape), "at": payload.add(part)}


def _as_tensor(part: Bytes, dtype: str, shape: list[int]) -> Tensor:
    import torch

    kind = getattr(torch, dtype)
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(part).view(kind).reshape(shape)
