"""What the files of a Hugging Face folder say about its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from cabochon.core.errors import FolderError, TokenizerMismatch

__all__ = [
    "ControlIds",
    "open_backend",
    "read_chat_template",
    "read_control_ids",
    "read_object",
    "read_utf8",
]


@dataclass(frozen=True, kw_only=True)
class ControlIds:
    """The ids of the tokens that mean something; None where a tokenizer has none."""

    pad: int | None = None
    eos: int | None = None
    bos: int | None = None
    unk: int | None = None
    mask: int | None = None
    start_of_turn: int | None = None
    end_of_turn: int | None = None


def open_backend(tokenizer_json: str, name: str = "tokenizer.json") -> tokenizers.Tokenizer:
    """The library's tokenizer, without truncation or padding.

    Raises:
        FolderError: the content is not a tokenizer.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises Exception itself
        raise FolderError(f"{name} cannot be read as a tokenizer: {error}") from error
    # Some published files carry the truncation of their last use, which would cut documents.
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        FolderError: the file is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} is not UTF-8 at byte {error.start}; it is damaged") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file.

    Raises:
        FolderError: the file is not UTF-8 or not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_utf8(path))
    except ValueError as error:
        raise FolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_control_ids(folder: Path, vocabulary: Mapping[str, int]) -> ControlIds:
    """Control ids by the first file that names them, the turn tokens by their Gemma names.

    Raises:
        FolderError: a file is not JSON.
        TokenizerMismatch: a token or an id is named that the vocabulary does not hold.
    """
    named = {
        name: _control_id(folder, name, vocabulary) for name in ("pad", "eos", "bos", "unk", "mask")
    }
    turns = {name: vocabulary.get(f"<{name}>") for name in ("start_of_turn", "end_of_turn")}
    return ControlIds(**named, **turns)


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The folder's chat template: its own file, or the entry of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_utf8(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name; the default one is meant for chat
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template if isinstance(template, str) else None


def _control_id(folder: Path, name: str, vocabulary: Mapping[str, int]) -> int | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_object(folder / file).get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        if token not in vocabulary:
            raise TokenizerMismatch(
                f"{folder / file} names {token!r} as {name}_token, which tokenizer.json does not "
                "hold; correct one of the two files"
            )
        return vocabulary[token]
    for file in ("generation_config.json", "config.json"):
        id_ = read_object(folder / file).get(f"{name}_token_id")
        id_ = id_[0] if isinstance(id_, list) and id_ else id_
        if not isinstance(id_, int):
            continue
        if id_ not in vocabulary.values():
            raise TokenizerMismatch(
                f"{folder / file} names {id_} as {name}_token_id, which tokenizer.json does not "
                "hold; correct one of the two files"
            )
        return id_
    return None
