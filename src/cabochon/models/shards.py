"""The safetensors files of a model folder: one, or several under an index; read strictly.

Layout as transformers writes it: `model.safetensors`, or `model-00001-of-00003.safetensors` and so
on with `model.safetensors.index.json`, whose `weight_map` says which file holds which tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cabochon.core.errors import FolderError, WeightsMismatch
from cabochon.files import flush, write_whole

__all__ = [
    "INDEX",
    "SINGLE",
    "Shards",
    "read_json",
    "staged",
    "weight_files",
    "write_json",
    "write_shards",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_PARTIAL = ".partial"
_SAVE = "save"
"""In the metadata of every file of a save of several: which save it is of."""


class Shards:
    """The tensors of a folder, opened but not yet read: shapes are known, bytes come when asked.

    Attributes:
        names: of every tensor in the files.
    """

    def __init__(self, folder: Path) -> None:
        """Open every file and compare it with the index.

        Raises:
            FolderError: the folder has no safetensors, lacks a shard, a file is damaged, or files
                are of different saves.
            WeightsMismatch: the index and the files disagree, naming the tensor.
        """
        self._files = {}
        self._holder: dict[str, str] = {}
        for path in weight_files(folder):
            try:
                self._files[path.name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FolderError(
                    f"{path} cannot be read as safetensors ({error}); it is damaged or was cut "
                    "short: copy it again"
                ) from error
            for name in self._files[path.name].keys():  # noqa: SIM118  (not a dict)
                if name in self._holder:
                    raise WeightsMismatch(
                        f"{name} lies in both {self._holder[name]} and {path.name} of {folder}; "
                        "keep the files of one save only"
                    )
                self._holder[name] = path.name
        self._check_saves(folder)
        self._check_index(folder)
        self.names = frozenset(self._holder)

    def _check_saves(self, folder: Path) -> None:
        """Files of transformers carry no mark; those of one save carry the same, or none."""
        first = next(iter(self._files))
        marks = {file: (held.metadata() or {}).get(_SAVE) for file, held in self._files.items()}
        for file, mark in marks.items():
            if mark != marks[first]:
                raise FolderError(
                    f"{first} and {file} of {folder} are of different saves: a save over an "
                    "earlier one was interrupted; save the model again, or copy all files of one "
                    "save"
                )

    def _check_index(self, folder: Path) -> None:
        if (folder / SINGLE).is_file():
            return
        for name, file in _weight_map(folder).items():
            if self._holder.get(name) != file:
                raise WeightsMismatch(
                    f"{folder / INDEX} says that {file} holds {name}; it lies in "
                    f"{self._holder.get(name, 'no file')}"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return tuple(self._files[self._holder[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it.

        Raises:
            WeightsMismatch: it is no floating-point tensor.
        """
        stored = self._files[self._holder[name]].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise WeightsMismatch(
                f"{name} in {self._holder[name]} is of type {stored}; weights must be one of "
                f"{', '.join(_DTYPES)} (a quantised folder must be dequantised first)"
            )
        return _DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now, on the CPU and in the type of the file."""
        tensor: Tensor = self._files[self._holder[name]].get_tensor(name)
        return tensor


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


def write_shards(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `tensors` into `folder` as one file, or as several of at most `max_shard_bytes` each.

    They replace an earlier save as `staged` says. A single tensor larger than the limit has a file
    of its own.

    Raises:
        FolderError: a file could not be written.
    """
    shards = _divide(tensors, max_shard_bytes)
    if len(shards) == 1:
        names, metadata = [SINGLE], {"format": "pt"}
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        metadata = {"format": "pt", _SAVE: _content(tensors)}
    with staged(folder) as aside:
        for file, shard in zip(names, shards, strict=True):
            held = {name: tensors[name].detach().contiguous() for name in shard}
            save_file(held, aside / file, metadata=metadata)
            if _SAVE in metadata:
                _sign(aside / file, metadata[_SAVE])
        if len(shards) > 1:
            where = {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            }
            size = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            write_json(aside / INDEX, index)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, which takes over its files when the block has ended well.

    Weights of an earlier save are deleted once the new ones are in place. A crash in between
    leaves the earlier save, the new one, or a mixture that `Shards` refuses to read: files of one
    save that lie under an index carry the same mark.

    Raises:
        FolderError: a file could not be written; until the files are moved, nothing has changed.
    """
    aside = folder / ".partial-weights"
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        _take_over(folder, aside)
    except (SafetensorError, OSError) as error:
        raise FolderError(f"the weights of {folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _take_over(folder: Path, aside: Path) -> None:
    weights = sorted(aside.glob("model*.safetensors"))
    if len(weights) > 1:
        _mark(weights)
    for path in aside.iterdir():
        flush(path)
    for path in weights:
        os.replace(path, folder / path.name)
    flush(folder)
    if (aside / INDEX).is_file():
        os.replace(aside / INDEX, folder / INDEX)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    flush(folder)
    kept = {path.name for path in weights}
    for path in folder.glob("model*.safetensors"):
        if path.name not in kept:
            path.unlink()
    for path in sorted(aside.iterdir()):
        os.replace(path, folder / path.name)
    flush(folder)


def _mark(weights: list[Path]) -> None:
    """Give files that another library wrote the mark of one save."""
    if all(_SAVE in _header(path)[0].get("__metadata__", {}) for path in weights):
        return
    whole = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    for path in weights:
        _sign(path, whole.hexdigest())


def _sign(path: Path, mark: str) -> None:
    """Put `mark` into a file's metadata, always in the same order: safetensors writes any."""
    header, size = _header(path)
    metadata = header.pop("__metadata__", {}) | {_SAVE: mark}
    whole = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= size:
        with path.open("r+b") as file:
            file.seek(8)
            file.write(text.ljust(size))
        return
    text = text.ljust(-(-len(text) // 8) * 8)
    marked = path.with_name(path.name + _PARTIAL)
    with path.open("rb") as source, marked.open("wb") as target:
        source.seek(8 + size)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 2**24)
    os.replace(marked, path)


def _header(path: Path) -> tuple[dict[str, dict[str, str]], int]:
    """Of a safetensors file: 8 bytes of length, little-endian, then so much JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), size


def _content(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names and bits, so that saving the same model twice gives the same files."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        bits = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        whole.update(bits.numpy().data)
    return whole.hexdigest()


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


def _divide(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
