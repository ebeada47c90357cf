"""Merges of model folders: tensors streamed from disk to disk, everything checked and recorded.

Any folder in the layout of Hugging Face will do, whatever its architecture: names and shapes of
tensors are compared, not known. Memory is that of a few slices (`stream`), never of a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cabochon.core.errors import ConfigError, FolderError, WeightsMismatch
from cabochon.files import whole
from cabochon.weight_files import Stored, read_json, stored_tensors, write_json
from cabochon.weights.compare import compare_configs, compare_tensors, compare_tokenizers
from cabochon.weights.formulas import Formula
from cabochon.weights.geometry import Per, TaskVectors, group_of, grouped
from cabochon.weights.stream import (
    FLOATS,
    Piece,
    Threads,
    elements,
    equal,
    inner_products,
    shards_of,
    threads,
    write_tensors,
)

__all__ = ["RECORD", "Dtype", "merge", "task_vectors"]

RECORD = "merge.json"
"""In the folder that a merge writes: formula, sources, coefficients and hashes."""

Dtype = Literal["stored", "float32", "bf16", "fp16"]
_TYPES = {"float32": "F32", "bf16": "BF16", "fp16": "F16"}
_NAMES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""As config.json calls them."""

_COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.tiktoken", "spiece.model",
    "preprocessor_config.json", "processor_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


def merge(
    formula: Formula,
    models: Sequence[Path],
    out: Path,
    *,
    base: Path | None = None,
    dtype: Dtype = "stored",
    shard_bytes: int = 4 * 10**9,
    workers: int = 1,
) -> dict[str, Any]:
    """Write the merge of model folders into a new folder; it is there whole or not at all.

    The files beside the weights are the first model's. The files are read again and
    compared with what was computed; `merge.json` records formula, sources, and hashes.

    Args:
        formula: what is computed.
        models: folders with config.json and safetensors, in the order of the formula.
        out: absent, or an empty folder.
        base: what the task vectors begin at, or the start of `towards`.
        dtype: of the floating-point tensors written; "stored" keeps the first model's types, and
            asks the same of all.
        shard_bytes: of one file at most, unless a single tensor is larger.
        workers: threads; they change no result.

    Returns:
        The record, as in `merge.json`.

    Raises:
        FolderError: a folder is absent or damaged, `out` is in use, or could not be written.
        ConfigError: a folder is given twice.
        WeightsMismatch, TokenizerMismatch: the folders hold models that cannot be merged.
        NonFinite: a tensor holds NaN or an infinity.
    """
    sources = [*models, *([] if base is None else [base])]
    _check_places(sources, out)
    tensors = [stored_tensors(folder) for folder in sources]
    remarks = _compare(sources, tensors, dtype)
    with threads(workers) as held:
        _check_integers(sources, tensors, held)
        hashes = {path: held.hashed(path) for path in _weight_paths(tensors)}
        copies = {} if formula.per is None else _copies(tensors, held)
        coefficients, angles = _coefficients(formula, tensors, copies, len(models), held)
        shards = shards_of(_pieces(tensors, coefficients, dtype), shard_bytes)
        record = {
            "cabochon": version("cabochon"),
            "method": formula.method,
            "formula": formula.text,
            **formula.settings,
            "dtype": dtype,
            "angles": angles,
            "stored_twice": copies,
            "remarks": remarks,
        }
        return _write(record, sources, base, out, shards, hashes, held)


def task_vectors(
    base: Path, models: Sequence[Path], per: Per = "block", *, workers: int = 1
) -> tuple[dict[str, TaskVectors], list[str]]:
    """Lengths and cosines of the models' task vectors, group by group; and remarks.

    Raises:
        FolderError: a folder is absent or damaged.
        ConfigError: a folder is given twice.
        WeightsMismatch, TokenizerMismatch: the folders hold models that cannot be compared.
        NonFinite: a tensor holds NaN or an infinity.
    """
    sources = [*models, base]
    _check_twice(sources)
    tensors = [stored_tensors(folder) for folder in sources]
    remarks = _compare(sources, tensors, "float32")
    with threads(workers) as held:
        copies = _copies(tensors, held)
        groups = {name: group_of(copies.get(name, name), per) for name in tensors[0]}
        return grouped(_products(tensors, copies, held), groups), remarks


def _compare(
    sources: Sequence[Path], tensors: Sequence[Mapping[str, Stored]], dtype: Dtype
) -> list[str]:
    remarks = compare_configs(sources)  # the plainest words come from what is compared first
    remarks += compare_tokenizers(sources)
    compare_tensors(sources, tensors, same_types=dtype == "stored")
    return remarks


def _check_places(sources: Sequence[Path], out: Path) -> None:
    for folder in sources:
        if folder.resolve() == out.resolve():
            raise FolderError(
                f"{out} is one of the models that are merged; it would be lost: choose a new folder"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(f"{out} exists already; remove it or choose another name")
    _check_twice(sources)


def _check_twice(sources: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for folder in sources:
        if folder.resolve() in seen:
            raise ConfigError(
                f"{folder} is given twice (as {seen[folder.resolve()]} before); a model merged "
                "with itself is that model: give each once, and more weight where it shall count "
                "more"
            )
        seen[folder.resolve()] = folder


def _check_integers(
    sources: Sequence[Path], tensors: Sequence[Mapping[str, Stored]], held: Threads
) -> None:
    for name, stored in tensors[0].items():
        if stored.type in FLOATS:
            continue
        for folder, other in zip(sources[1:], tensors[1:], strict=True):
            if not equal([stored, other[name]], held):
                raise WeightsMismatch(
                    f"{name}, of type {stored.type}, differs between {sources[0]} and {folder}; "
                    "only floating-point tensors can be merged, others must be equal"
                )


def _weight_paths(tensors: Sequence[Mapping[str, Stored]]) -> list[Path]:
    return list(dict.fromkeys(each.file for held in tensors for each in held.values()))


def _copies(tensors: Sequence[Mapping[str, Stored]], held: Threads) -> dict[str, str]:
    """Name -> the earlier tensor outside of all blocks that it equals in every folder.

    So an embedding that is stored a second time as head counts once.
    """
    found: dict[str, str] = {}
    first = tensors[0]
    outside = [name for name in first if group_of(name, "block") == name]
    large = sorted(name for name in outside if len(first[name].shape) > 1)
    for place, name in enumerate(large):
        for other in large[:place]:
            same = first[name].shape == first[other].shape and other not in found
            if same and all(equal([each[name], each[other]], held) for each in tensors):
                found[name] = other
                break
    return found


def _products(
    tensors: Sequence[Mapping[str, Stored]], copies: Mapping[str, str], held: Threads
) -> dict[str, TaskVectors]:
    *models, base = tensors
    names = [n for n, stored in base.items() if stored.type in FLOATS and n not in copies]
    asked = {
        name: inner_products(name, base[name], [model[name] for model in models], held)
        for name in names
    }
    return {
        name: TaskVectors(products=result(), elements=elements(base[name]))
        for name, result in asked.items()
    }


def _coefficients(
    formula: Formula,
    tensors: Sequence[Mapping[str, Stored]],
    copies: Mapping[str, str],
    count: int,
    held: Threads,
) -> tuple[dict[str, list[float]], dict[str, dict[str, object]]]:
    """Of every source in every tensor, the base's last; and the angles they follow from."""
    vectors: dict[str, TaskVectors] = {}
    groups = dict.fromkeys(tensors[0], "all")
    if formula.per is not None:
        groups = {name: group_of(copies.get(name, name), formula.per) for name in tensors[0]}
        vectors = grouped(_products(tensors, copies, held), groups)
    found = {group: formula.coefficients(group, vectors.get(group)) for group in vectors or ["all"]}
    angles = {
        group: {
            "norms": vectors[group].norms.tolist(),
            "cosines": [
                [None if cosine != cosine else cosine for cosine in row]
                for row in vectors[group].cosines.tolist()
            ],
            "coefficients": found[group],
        }
        for group in vectors
    }
    result = {}
    for name, group in groups.items():
        shares = found.get(group) or [1.0] + [0.0] * (count - 1)  # nothing to add up there
        origin = [1.0 - sum(shares)] if len(tensors) > count else []
        result[name] = [*shares, *origin]
    return result, angles


def _pieces(
    tensors: Sequence[Mapping[str, Stored]],
    coefficients: Mapping[str, Sequence[float]],
    dtype: Dtype,
) -> list[Piece]:
    return [
        Piece(
            name=name,
            type=_TYPES.get(dtype, stored.type) if stored.type in FLOATS else stored.type,
            terms=_terms(name, tensors, coefficients[name]),
        )
        for name, stored in tensors[0].items()
    ]


def _terms(
    name: str, tensors: Sequence[Mapping[str, Stored]], shares: Sequence[float]
) -> tuple[tuple[Stored, float], ...]:
    """What is added up; what counts for nothing is left out, so that an end stays as it is."""
    if tensors[0][name].type not in FLOATS:
        return ((tensors[0][name], 1.0),)
    return tuple(
        (held[name], share) for held, share in zip(tensors, shares, strict=True) if share != 0.0
    )


def _write(
    record: dict[str, Any],
    sources: Sequence[Path],
    base: Path | None,
    out: Path,
    shards: Mapping[str, Sequence[Piece]],
    hashes: Mapping[Path, Future[str]],
    held: Threads,
) -> dict[str, Any]:
    size = sum(piece.nbytes for pieces in shards.values() for piece in pieces)
    try:
        _check_room(out, size)
        with whole(out) as place:
            place.mkdir()
            _copy_files(sources, place)
            if record["dtype"] != "stored":
                _name_type(place / "config.json", _NAMES[record["dtype"]])
            written = write_tensors(place, shards, held)
            _check_written(place, shards)
            record["sources"] = [
                {
                    "folder": str(folder),
                    "role": "base" if folder is base else "model",
                    "blake2b": {
                        p.name: h.result() for p, h in hashes.items() if p.parent == folder
                    },
                }
                for folder in sources
            ]
            record["blake2b"] = written
            write_json(place / RECORD, record)
    except OSError as error:
        if isinstance(error, FolderError):
            raise
        raise FolderError(
            f"{out} could not be written: {error}; nothing is left there. The merge takes "
            f"{size / 1e9:.2f} GB of disk"
        ) from error
    return record


def _check_room(out: Path, size: int) -> None:
    """Say at once what a full disk would say after a while."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < size:
        raise FolderError(
            f"{out} could not be written: the merge takes {size / 1e9:.2f} GB, and its disk has "
            f"{free / 1e9:.2f} GB free; make room or choose another disk"
        )


def _copy_files(sources: Sequence[Path], place: Path) -> None:
    """What lies beside the weights of the first model; a tokenizer from the first that has one."""
    for pattern in _COPIED:
        for path in sorted(sources[0].glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, place / path.name)
    if any(
        (place / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return
    for folder in sources[1:]:
        for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"):
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and not (place / path.name).exists():
                    shutil.copyfile(path, place / path.name)


def _name_type(config: Path, name: str) -> None:
    values = json.loads(json.dumps(read_json(config)))
    for part in (values, values.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = name
    write_json(config, values)


def _check_written(place: Path, shards: Mapping[str, Sequence[Piece]]) -> None:
    """Open the folder as a reader would; names, shapes and types must be those that were meant."""
    found = {
        name: (held.type, held.shape, held.file.name)
        for name, held in stored_tensors(place).items()
    }
    meant = {
        piece.name: (piece.type, piece.shape, file)
        for file, pieces in shards.items()
        for piece in pieces
    }
    if found != meant:
        raise FolderError(f"{place.name}, read again, holds other tensors than were written")
