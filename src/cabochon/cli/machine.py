"""Devices, threads and precisions by name; models by the path of their folder or run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch

from cabochon import folders
from cabochon.core import Backbone
from cabochon.core.errors import ConfigError, FolderError
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.training import checkpoint
from cabochon.weight_files import read_json

__all__ = [
    "DTYPES",
    "device_of",
    "load_backbone",
    "load_model",
    "model_folder",
    "refuse_rows_beyond",
    "stated_context",
    "tokenizer_of",
    "use_threads",
]

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one.

    Under torchrun `auto` and `cuda` are the GPU of this process.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{name!r} is no device that is used here; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{name!r} was asked for, but torch finds no GPU; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{name!r} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return device


def use_threads(count: int) -> int:
    """How many threads torch now uses: `count`; if 0, OMP_NUM_THREADS or else one a core."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = count or (int(wished) if wished.isdecimal() and int(wished) else cores or 1)
    torch.set_num_threads(chosen)
    return chosen


def model_folder(path: str) -> Path:
    """The model folder that `path` means: itself, or the newest checkpoint's of a run.

    Raises:
        FolderError: it is neither.
        CheckpointError: it lies in a checkpoint and is not as it was saved.
    """
    found = _model_folder(path)
    if (found.parent / "checksums.json").is_file():
        checkpoint.verify(found.parent, part=found.name)
    return found


def _model_folder(path: str) -> Path:
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
        saved = checkpoint.completed(folder / "checkpoints")
        if saved:
            return saved[max(saved)] / "model"
        stages = sorted(str(each.parent) for each in folder.glob("*/config.yaml"))
        if stages:
            raise FolderError(
                f"{folder} is the folder of a pipeline; name one of its runs: {', '.join(stages)}"
            )
        raise FolderError(f"{folder} is a run without a checkpoint yet; resume it first")
    if not folder.exists():
        raise FolderError(f"there is no model folder or run at {folder}")
    if not folder.is_dir():
        raise FolderError(f"{folder} is a file; expected a model folder or a run directory")
    there = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
    raise FolderError(
        f"{folder} is neither a model folder (it has no config.json) nor a run directory "
        f"(no manifest.json and config.yaml); it holds {there}"
    )


def refuse_rows_beyond(context: int, rows: int, source: str) -> None:
    """A model has learned nothing of positions beyond its context.

    Raises:
        ConfigError: rows are longer than that.
    """
    if rows > context:
        raise ConfigError(
            f"rows of {rows} tokens are longer than the {context} that {source} was made for; "
            f"give --context {context} or less"
        )


def stated_context(folder: Path) -> int | None:
    """How many tokens config.json of a model folder says that it was made for; None: it does not.

    Raises:
        FolderError: there is no config.json that can be read.
    """
    values = read_json(folder / "config.json")
    inner = values.get("text_config")
    for stated in (values, inner if isinstance(inner, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            longest = stated.get(name)
            if isinstance(longest, int):
                return longest
    return None


def load_backbone(path: str, precision: str, device: str) -> tuple[Backbone, Tokenizer]:
    """As `load_model`, for those that only ask the model to predict."""
    model, tokenizer = load_model(path, precision, device)
    return cast(Backbone, model), tokenizer  # nn.Module hides what calling it gives


def load_model(path: str, precision: str, device: str) -> tuple[Gemma | ForeignModel, Tokenizer]:
    """Model and tokenizer of a model folder or run, in `precision` ("stored" keeps the file's)."""
    return folders.load(model_folder(path), dtype=DTYPES.get(precision), device=device_of(device))


def tokenizer_of(path: str) -> Tokenizer:
    """The tokenizer of a tokenizer folder, a model folder or a run.

    Raises:
        FolderError: there is none.
    """
    folder = Path(path)
    return Tokenizer.load(folder if (folder / "tokenizer.json").is_file() else model_folder(path))
