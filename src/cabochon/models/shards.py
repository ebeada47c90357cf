"""The weights of a model folder as torch tensors: one file, or several under an index."""

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
from cabochon.files import flush
from cabochon.weight_files import INDEX, SAVE, SINGLE, header, stored_tensors, write_json

__all__ = ["Shards", "staged", "write_shards"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_PARTIAL = ".partial"


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
        self._stored = stored_tensors(folder)
        files = {stored.file for stored in self._stored.values()}
        self._files = {file: safe_open(file, framework="pt") for file in files}
        self.names = frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it.

        Raises:
            WeightsMismatch: it is no floating-point tensor.
        """
        stored = self._stored[name]
        if stored.type not in _DTYPES:
            raise WeightsMismatch(
                f"{name} in {stored.file.name} is of type {stored.type}; weights must be one of "
                f"{', '.join(_DTYPES)} (a quantised folder must be dequantised first)"
            )
        return _DTYPES[stored.type]

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now, on the CPU and in the type of the file."""
        tensor: Tensor = self._files[self._stored[name].file].get_tensor(name)
        return tensor


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
        metadata = {"format": "pt", SAVE: _content(tensors)}
    with staged(folder) as aside:
        for file, shard in zip(names, shards, strict=True):
            held = {name: tensors[name].detach().contiguous() for name in shard}
            save_file(held, aside / file, metadata=metadata)
            if SAVE in metadata:
                _sign(aside / file, metadata[SAVE])
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
    if all(SAVE in header(path)[0].get("__metadata__", {}) for path in weights):
        return
    whole = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    for path in weights:
        _sign(path, whole.hexdigest())


def _sign(path: Path, mark: str) -> None:
    """Put `mark` into a file's metadata, always in the same order: safetensors writes any."""
    entries, size = header(path)
    metadata = entries.pop("__metadata__", {}) | {SAVE: mark}
    whole = {"__metadata__": dict(sorted(metadata.items())), **entries}
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


def _content(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names and bits, so that saving the same model twice gives the same files."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        bits = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        whole.update(bits.numpy().data)
    return whole.hexdigest()


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
