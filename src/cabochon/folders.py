"""Model folders: a model and its tokenizer together, in the layout of Hugging Face.

A folder saved here records the fingerprint of its tokenizer in config.json, under the key
`cabochon`, which transformers keeps and ignores. A tokenizer of the same size but of other content
is thereby refused when the folder is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cabochon.core.errors import FolderError, TokenizerMismatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import sha256_of
from cabochon.models.foreign import ForeignModel, read_foreign, write_foreign
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import (
    RewardModel,
    is_reward_model,
    read_reward_model,
    write_reward_model,
)
from cabochon.weight_files import read_json, weight_files, write_json

__all__ = [
    "check_tokenizer",
    "fingerprint",
    "load",
    "load_model",
    "load_reward",
    "save",
    "saved_here",
]

_OURS = "cabochon"


def load(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Gemma | ForeignModel, Tokenizer]:
    """The model and the tokenizer of a Hugging Face folder, once they are sure to belong together.

    A tokenizer that pads with EOS, or knows no padding, serves to generate and to evaluate: padding
    is masked by `documents`. What makes rows to train on refuses it (`Tokenizer.learnable_end`).

    Args:
        folder: config.json, safetensors and tokenizer.json.
        dtype: cast the weights to this type; None keeps the folder's.
        device: where the parameters go.

    Raises:
        FolderError: a file is absent, incomplete or damaged.
        ConfigError: config.json describes what our decoder does not compute.
        WeightsMismatch: a tensor is missing, surplus, misshaped or of another type.
        TokenizerMismatch: the tokenizer is not the model's.
        MissingExtra: the model is no Gemma, and transformers is not installed.
    """
    folder = Path(folder)
    tokenizer = _tokenizer(folder)
    model = load_model(folder, dtype=dtype, device=device)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def load_reward(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[RewardModel, Tokenizer]:
    """As `load`, of a folder whose model gives one number for a text.

    Raises:
        FolderError: also where the folder holds a model that writes.
    """
    folder = Path(folder)
    tokenizer = _tokenizer(folder)
    model = read_reward_model(folder, dtype, device)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def load_model(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Gemma | ForeignModel:
    """The model of a Hugging Face folder: a Gemma by our decoder, any other by transformers.

    Raises:
        FolderError: a file is absent, incomplete or damaged; or the folder holds a reward model.
        ConfigError: config.json describes a Gemma that our decoder does not compute.
        WeightsMismatch: a tensor is missing, surplus, misshaped or of another type.
        MissingExtra: the model is no Gemma, and transformers is not installed.
    """
    folder = Path(folder)
    if is_reward_model(folder):
        raise FolderError(
            f"{folder} holds a reward model, which judges texts and writes none; name it where a "
            "reward is asked for (--reward)"
        )
    kind = read_json(folder / "config.json").get("model_type")
    read = read_gemma if kind in ("gemma", "gemma2") else read_foreign
    return read(folder, dtype, device)


def save(
    model: Gemma | ForeignModel | RewardModel,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Write a folder that `load`, and transformers, read.

    Args:
        model: written in the type of its parameters.
        tokenizer: the one the model was made with; its fingerprint is recorded.
        folder: made if absent; an earlier save in it is replaced.
        max_shard_bytes: of one safetensors file.

    Raises:
        TokenizerMismatch: the tokenizer cannot be the model's.
        FolderError: a file could not be written.
    """
    folder = Path(folder)
    check_tokenizer(model, tokenizer)
    # The tokenizer first: what a crash leaves of a save over an earlier one is then refused by the
    # fingerprint in the earlier config.json.
    tokenizer.save(folder)
    if isinstance(model, RewardModel):
        write_reward_model(model, folder, max_shard_bytes=max_shard_bytes)
    elif isinstance(model, Gemma):
        write_gemma(model, folder, max_shard_bytes=max_shard_bytes)
    else:
        write_foreign(model, folder, max_shard_bytes=max_shard_bytes)
    values = read_json(folder / "config.json")
    values[_OURS] = {"tokenizer": tokenizer.fingerprint()}
    write_json(folder / "config.json", values)


def saved_here(folder: Path | str) -> bool:
    """Whether `save` wrote the folder, or a model of a folder that it wrote; else it is foreign."""
    return isinstance(read_json(Path(folder) / "config.json").get(_OURS), dict)


def fingerprint(folder: Path | str) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder, by file name.

    Raises:
        FolderError: the folder has no safetensors, or lacks a shard.
    """
    return {path.name: sha256_of(path) for path in weight_files(Path(folder))}


def check_tokenizer(model: Gemma | ForeignModel | RewardModel, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids the model has no rows for, or gives another meaning.

    Raises:
        TokenizerMismatch: it has more entries than the embedding has rows (fewer is common: rows
            are padded), or, for a Gemma, another BOS, EOS or padding than the configuration; a
            tokenizer that pads with EOS has no padding of its own to compare.
    """
    if isinstance(model, RewardModel):
        model = model.backbone
    if isinstance(model, ForeignModel):
        rows = model.inner.get_input_embeddings().weight.shape[0]
        _check_rows(rows, tokenizer)
        return
    config = model.config
    _check_rows(config.vocab_size, tokenizer)
    for name, expected in (("pad", config.pad_id), ("eos", config.eos_id), ("bos", config.bos_id)):
        found = getattr(tokenizer, f"{name}_id")
        borrowed = name == "pad" and tokenizer.eos_is_pad
        if None not in (found, expected) and found != expected and not borrowed:
            raise TokenizerMismatch(
                f"the tokenizer's {name.upper()} is id {found}, the model's is {expected}; give "
                f"the tokenizer the model was made with, or set {name}_id in the model's "
                "configuration before it is trained"
            )


def _tokenizer(folder: Path) -> Tokenizer:
    """The folder's, once it is sure to be the one that was saved; before weights take minutes."""
    values = read_json(folder / "config.json")
    weight_files(folder)
    tokenizer = Tokenizer.load(folder)
    _check_recorded(folder, values, tokenizer)
    return tokenizer


def _check_rows(rows: int, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > rows:
        raise TokenizerMismatch(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's embedding {rows} "
            "rows; give the tokenizer the model was made with"
        )


def _check_recorded(folder: Path, values: dict[str, object], tokenizer: Tokenizer) -> None:
    """Compare with the fingerprint that `save` recorded, where it did."""
    ours = values.get(_OURS)
    recorded = ours.get("tokenizer") if isinstance(ours, dict) else None
    if recorded is not None and recorded != (found := tokenizer.fingerprint()):
        raise TokenizerMismatch(
            f"{folder} holds another tokenizer than its model was made with (fingerprint "
            f"{found[:12]}, recorded {str(recorded)[:12]}); put the model's own tokenizer.json "
            "and tokenizer_config.json back"
        )
