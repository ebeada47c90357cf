"""The safetensors files of a folder: which tensor lies where; their JSON; no tensor library.

Layout as transformers writes it: `model.safetensors`, or `model-00001-of-00003.safetensors` and so
on with `model.safetensors.index.json`, whose `weight_map` says which file holds which tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cabochon.core.errors import FolderError, WeightsMismatch
from cabochon.files import write_whole

__all__ = [
    "INDEX",
    "SAVE",
    "SINGLE",
    "Stored",
    "header",
    "read_json",
    "stored_tensors",
    "weight_files",
    "write_json",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAVE = "save"
"""In the metadata of every file of a save of several: which save it is of."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    type: str
    """As safetensors names it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, from the beginning of the file."""
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, once its files are sure to be whole and of one save.

    Raises:
        FolderError: the folder has no safetensors, lacks a shard, a file is damaged, or files
            are of different saves.
        WeightsMismatch: the index and the files disagree, naming the tensor.
    """
    found: dict[str, Stored] = {}
    marks: dict[str, str | None] = {}
    for path in weight_files(folder):
        content, size = _checked_header(path)
        marks[path.name] = content.pop("__metadata__", {}).get(SAVE)
        for name, entry in content.items():
            if name in found:
                raise WeightsMismatch(
                    f"{name} lies in both {found[name].file.name} and {path.name} of {folder}; "
                    "keep the files of one save only"
                )
            start, stop = entry["data_offsets"]
            found[name] = Stored(
                file=path,
                type=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=8 + size + start,
                stop=8 + size + stop,
            )
    _check_saves(folder, marks)
    _check_index(folder, found)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        FolderError: no folder, no safetensors, a file that the index names is missing, or there
            are both a single file and an index of others.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder; give a Hugging Face model folder")
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file() and set(_weight_map(folder).values()) != {SINGLE}:
            raise FolderError(
                f"{folder} holds {SINGLE} and also {INDEX}, which names other files: two saves "
                "are mixed, or one was interrupted; delete whichever is not wanted"
            )
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"; {pickled[0]} is pickle, which is never read: save it again as safetensors with "
            "transformers"
            if pickled
            else ""
        )
        raise FolderError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    files = sorted(set(_weight_map(folder).values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FolderError(
            f"{folder} lacks {', '.join(missing)} of the {len(files)} files its {INDEX} names; "
            "copy what is missing"
        )
    return [folder / file for file in files]


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file: 8 bytes of length, little-endian, then so much JSON.

    Returns:
        The JSON, and its length in bytes.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), size


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        FolderError: the file is absent, no JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} does not exist; is it a Hugging Face model folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object: the file is there in full, or as it was."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def _weight_map(folder: Path) -> dict[str, str]:
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FolderError(f"{folder / INDEX} has no weight_map; save the model again")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise FolderError(
                f"{folder / INDEX} puts {name} into {file!r}; expected a file name in that folder"
            )
    return where


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        safe_open(path, framework="np")  # the library checks types, sizes, and that nothing is left
        return header(path)
    except (SafetensorError, OSError) as error:
        raise FolderError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or was cut "
            "short: copy it again"
        ) from error


def _check_saves(folder: Path, marks: Mapping[str, str | None]) -> None:
    """Files of transformers carry no mark; those of one save carry the same, or none."""
    first = next(iter(marks))
    for file, mark in marks.items():
        if mark != marks[first]:
            raise FolderError(
                f"{first} and {file} of {folder} are of different saves: a save over an "
                "earlier one was interrupted; save the model again, or copy all files of one "
                "save"
            )


def _check_index(folder: Path, found: Mapping[str, Stored]) -> None:
    if (folder / SINGLE).is_file():
        return
    for name, file in _weight_map(folder).items():
        holder = found[name].file.name if name in found else "no file"
        if holder != file:
            raise WeightsMismatch(
                f"{folder / INDEX} says that {file} holds {name}; it lies in {holder}"
            )
