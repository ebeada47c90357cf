"""Whether model folders may be merged: the same architecture, vocabulary, tensors and types.

What changes the meaning of a tensor or of a token is refused. What does not (who saved it, how it
is trained, how it chats) is named, and the first folder's is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cabochon.core.errors import FolderError, TokenizerMismatch, WeightsMismatch
from cabochon.weight_files import Stored, read_json
from cabochon.weights.stream import FLOATS

__all__ = [
    "compare_configs",
    "compare_tensors",
    "compare_tokenizers",
]

_INCIDENTAL = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "cabochon",
    "_attn_implementation",
)  # fmt: skip
"""Keys of config.json that say nothing of the function: types are compared on the tensors."""

_NAMED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "initializer_factor",
    "dropout", "pdrop", "gradient_checkpointing",
)  # fmt: skip
"""Endings of keys that matter to training or to where a text ends: a difference is named."""

_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Compared byte for byte where there is no tokenizer.json."""

_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


def compare_configs(folders: Sequence[Path]) -> list[str]:
    """What differs between the first folder's config.json and the others', without consequence.

    A key that only one of two files has is named: versions of transformers spell out different
    defaults.

    Raises:
        FolderError: a config.json is absent or no JSON.
        WeightsMismatch: a value differs that changes what a model computes.
    """
    first, *others = (dict(_flat(read_json(folder / "config.json"))) for folder in folders)
    remarks = []
    for folder, other in zip(folders[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            ending = key.rpartition(".")[2]
            if ending in _INCIDENTAL or first.get(key, ...) == other.get(key, ...):
                continue
            if key not in first or key not in other:
                holder, value = (folders[0], first[key]) if key in first else (folder, other[key])
                remarks.append(f"config.json: only {holder} has {key} = {value!r}")
            elif ending.endswith(_NAMED):
                remarks.append(
                    f"config.json: {key} is {first[key]!r} in {folders[0]} and {other[key]!r} in "
                    f"{folder}"
                )
            else:
                raise WeightsMismatch(
                    f"{folders[0]} and {folder} are different models: {key} is {first[key]!r} in "
                    f"the first and {other[key]!r} in the second; merge models that were trained "
                    "from the same one"
                )
    return remarks


def compare_tokenizers(folders: Sequence[Path]) -> list[str]:
    """What differs between the folders' tokenizers without giving a token another meaning.

    Raises:
        FolderError: a tokenizer.json is no JSON.
        TokenizerMismatch: tokens, their ids or the merges differ.
    """
    holders = [folder for folder in folders if _files(folder)]
    if not holders:
        return ["no folder has a tokenizer: that their tokens mean the same is taken on trust"]
    remarks = [f"{folder} has no tokenizer" for folder in folders if folder not in holders]
    first = holders[0]
    for other in holders[1:]:
        if (first / "tokenizer.json").is_file() and (other / "tokenizer.json").is_file():
            remarks += _compare_contents(first, other)
        else:
            for file in _VOCABULARIES:
                if _content(first / file) != _content(other / file):
                    raise TokenizerMismatch(
                        f"{file} differs between {first} and {other}, or only one has it; merge "
                        "models of one tokenizer, or put the same tokenizer files into both"
                    )
    for other in folders[1:]:
        remarks += [
            f"{file} differs between {folders[0]} and {other}, or only one has it"
            for file in _BESIDE
            if _content(folders[0] / file) != _content(other / file)
        ]
    return remarks


def compare_tensors(
    folders: Sequence[Path], tensors: Sequence[Mapping[str, Stored]], *, same_types: bool
) -> None:
    """Returns if all folders hold the same tensors.

    Raises:
        WeightsMismatch: a tensor is missing, surplus, misshaped, quantised, or, where they must be
            the same, of another type; or none is of a floating-point type.
    """
    first = tensors[0]
    for name, stored in first.items():
        if stored.type not in FLOATS and stored.type.startswith("F"):
            raise WeightsMismatch(
                f"{name} of {folders[0]} is of type {stored.type}: it is quantised, and numbers "
                "without their scales cannot be added; dequantise the model first"
            )
    if not any(stored.type in FLOATS for stored in first.values()):
        raise WeightsMismatch(
            f"{folders[0]} holds no floating-point tensor, so there is nothing to merge or compare"
        )
    for folder, other in zip(folders[1:], tensors[1:], strict=True):
        if surplus := sorted(first.keys() ^ other.keys()):
            holder = folders[0] if surplus[0] in first else folder
            raise WeightsMismatch(
                f"{folders[0]} and {folder} hold different tensors: only {holder} has "
                f"{', '.join(surplus[:3])}{_more(surplus[3:])}; merge models of one architecture, "
                "saved in the same way"
            )
        for name, stored in first.items():
            if stored.shape != other[name].shape:
                raise WeightsMismatch(
                    f"{name} has shape {list(stored.shape)} in {folders[0]} and "
                    f"{list(other[name].shape)} in {folder}; merge models of one architecture and "
                    "vocabulary"
                )
            floats = stored.type in FLOATS and other[name].type in FLOATS
            if stored.type != other[name].type and (same_types or not floats):
                raise WeightsMismatch(
                    f"{name} is of type {stored.type} in {folders[0]} and {other[name].type} in "
                    f"{folder}; say which type the result shall have (--dtype)"
                )


def _compare_contents(first: Path, other: Path) -> list[str]:
    mine, theirs = (read_json(folder / "tokenizer.json") for folder in (first, other))
    here, there = _vocabulary(mine, first), _vocabulary(theirs, other)
    unlike = sorted(
        {token for token in here.keys() | there.keys() if here.get(token) != there.get(token)},
        key=lambda token: here.get(token, there.get(token, 0)),
    )
    if unlike:
        shown = ", ".join(
            f"{token!r} is {here.get(token, 'absent')} against {there.get(token, 'absent')}"
            for token in unlike[:3]
        )
        raise TokenizerMismatch(
            f"{first} and {other} have different vocabularies: {shown}{_more(unlike[3:])}; their "
            "embeddings cannot be averaged row by row; merge models of one tokenizer"
        )
    if _merges(mine) != _merges(theirs):
        raise TokenizerMismatch(
            f"{first} and {other} have the same tokens but merge them differently; merge models of "
            "one tokenizer"
        )
    return [
        f"tokenizer.json: {part} differs between {first} and {other}"
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        if mine.get(part) != theirs.get(part)
    ]


def _vocabulary(content: Mapping[str, Any], folder: Path) -> dict[str, int]:
    try:
        pieces = content["model"]["vocab"]
        if isinstance(pieces, list):  # Unigram: pieces with their scores, the place is the id
            pieces = {piece: place for place, (piece, _) in enumerate(pieces)}
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
        return {**pieces, **added}
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error


def _merges(content: Mapping[str, Any]) -> list[list[str]]:
    """As pairs; older files write them as one text with a space in it."""
    merges = content["model"].get("merges") or []
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def _files(folder: Path) -> list[str]:
    return [file for file in ("tokenizer.json", *_VOCABULARIES) if (folder / file).is_file()]


def _content(path: Path) -> object:
    """What a file says: JSON by its values, anything else by its bytes; None if there is none."""
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return path.read_bytes()
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise FolderError(f"{path} is not JSON: {error}") from error


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    """Nested keys joined by points."""
    for key, value in values.items():
        if isinstance(value, dict) and key not in _INCIDENTAL:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _more(left: Sequence[str]) -> str:
    return f" and {len(left)} more" if left else ""
