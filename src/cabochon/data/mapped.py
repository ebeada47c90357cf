"""The arrays of a safetensors file, mapped into memory rather than read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cabochon.weight_files import header

__all__ = ["mapped"]

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
}


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of the file by its name; the system reads what is looked at."""
    content, size = header(path)
    content.pop("__metadata__", None)
    return {
        name: np.memmap(
            path,
            dtype=_DTYPES[entry["dtype"]],
            mode="r",
            offset=8 + size + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        if math.prod(entry["shape"])  # nothing cannot be mapped
        else np.zeros(entry["shape"], _DTYPES[entry["dtype"]])
        for name, entry in content.items()
    }
