"""`cabochon export RUN_OR_MODEL OUT`: a folder for Hugging Face, or one GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cabochon.cli.configuration import parse

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["ExportSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to write, where, and how."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """A run directory (its newest checkpoint is taken), a checkpoint or a model folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """A folder (hf) or a file (gguf) that does not exist yet."""
    format: Literal["hf", "gguf"] = "hf"
    """hf: config.json, safetensors and tokenizer files; gguf: one file for llama.cpp."""
    precision: Literal["stored", "float32", "bf16"] = "stored"
    """The type of the weights that are written."""
    average: bool = False
    """The moving average that the run kept beside its weights (--ema), instead of the weights."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Writes the model and says where it is."""
    settings = parse(
        ExportSettings, argv, prog="cabochon export", description="Write a model for others."
    )
    from cabochon import folders
    from cabochon.cli.machine import load_model, model_folder
    from cabochon.cli.output import answer
    from cabochon.cli.places import free
    from cabochon.core.errors import ConfigError
    from cabochon.files import whole

    if settings.format == "hf" and settings.out.suffix == ".gguf":
        raise ConfigError(f"{settings.out} is to be a GGUF file by its name: add --format gguf")
    free(settings.out)
    source = model_folder(settings.source)
    model, tokenizer = load_model(str(source), settings.precision, "cpu")
    if settings.average:
        _average(model, source.parent)
    if settings.format == "hf":
        with whole(settings.out) as aside:
            folders.save(model, tokenizer, aside)
    else:
        from cabochon.models.gemma.decoder import Gemma
        from cabochon.models.gemma.gguf import write_gguf

        if not isinstance(model, Gemma):
            raise ConfigError(f"{source} is no Gemma; gguf is written for Gemma alone, use hf")
        write_gguf(model, tokenizer, settings.out)
    files = [settings.out] if settings.out.is_file() else sorted(settings.out.iterdir())
    sizes = {each.name: each.stat().st_size for each in files}
    if settings.json:
        answer(
            {
                "source": source,
                "out": settings.out.resolve(),
                "format": settings.format,
                "files": sizes,
            }
        )
    else:
        print(settings.out)
    return 0


def _average(model: Module, saved: Path) -> None:
    """Puts the moving average of the checkpoint `saved` in the place of the model's weights."""
    from safetensors.torch import load_file

    from cabochon.core.errors import ConfigError
    from cabochon.training import checkpoint

    path = saved / "ema.safetensors"
    if not path.is_file():
        raise ConfigError(f"{saved} holds no moving average; train with --ema 0.999 to have one")
    checkpoint.verify(saved)
    model.load_state_dict(load_file(path))
