"""What writes for `cabochon generate`: our engine, transformers, or a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.cli.generate import GenerateSettings
    from cabochon.core import Backbone, Group, Key
    from cabochon.data.tokenizer import Tokenizer
    from cabochon.generation.settings import Settings

__all__ = ["Writer", "engine_models", "served", "transformers_own"]

Writer = Callable[
    ["Sequence[Tensor]", "Settings", "Key", int],
    "list[Group]",
]
"""Prompts, settings, key and number of samples to a group of completions for each prompt."""


def engine_models(
    settings: GenerateSettings,
) -> tuple[Backbone, Backbone | None, Tokenizer]:
    """The model that the engine is to use, as the settings want it, and its draft.

    Raises:
        ConfigError: 8 bits or compiling for a model that is no Gemma; no compiler.
        FolderError: there is no such model.
        TokenizerMismatch: the draft has another tokenizer.
    """
    import torch

    from cabochon.cli.machine import load_backbone
    from cabochon.core.errors import ConfigError, DataError, TokenizerMismatch
    from cabochon.generation.guidance import Guided, always
    from cabochon.models.gemma.decoder import Gemma

    model, tokenizer = load_backbone(settings.model, settings.precision, settings.device)
    draft = None
    if settings.draft:
        draft, other = load_backbone(settings.draft, settings.precision, settings.device)
        difference = tokenizer.difference(other)
        if difference:
            raise TokenizerMismatch(
                f"the draft model at {settings.draft} has another tokenizer than {settings.model}: "
                f"{difference}"
            )
    for flag, wanted in (("--int8", settings.int8), ("--compile", settings.compile)):
        if wanted and not isinstance(model, Gemma):
            raise ConfigError(f"{flag} is for Gemma models; {settings.model} holds another one")
    if settings.int8 and isinstance(model, Gemma):
        model = model.with_int8_decoding()
    if settings.compile and isinstance(model, Gemma):
        model = model.with_compiled_decoding()
        draft = draft.with_compiled_decoding() if isinstance(draft, Gemma) else draft
    if settings.guidance != 1.0:
        ids = tokenizer.encode(settings.negative, bos=tokenizer.bos_id is not None)
        if not ids:
            raise DataError("the tokenizer has no BOS: --guidance needs a --negative text")
        model = Guided(model, settings.guidance, always(torch.tensor(ids)))
    return model, draft, tokenizer


def transformers_own(path: str, precision: str, device: str) -> tuple[Writer, Tokenizer]:
    """The model of a folder or run, whatever its family, with transformers writing.

    Raises:
        MissingExtra: transformers is not installed.
        FolderError: there is no such model, or transformers cannot read it.
    """
    from functools import partial

    from cabochon.cli.machine import DTYPES, device_of, model_folder, tokenizer_of
    from cabochon.generation.hugging_face import generate
    from cabochon.models.foreign import read_foreign

    model = read_foreign(model_folder(path), DTYPES.get(precision), device_of(device))
    return partial(generate, model), tokenizer_of(path)


def served(path: str, url: str) -> tuple[Writer, Tokenizer]:
    """The model that a vLLM server at `url` serves, with the tokenizer of a folder or run.

    A key that the server wants is taken from the environment: VLLM_API_KEY.

    Raises:
        FolderError: there is no tokenizer.
        MissingExtra: httpx2 or tenacity is not installed.
        ServerError: the server cannot be reached, or does not answer as vLLM does.
    """
    from functools import partial

    from cabochon.cli.machine import tokenizer_of
    from cabochon.cli.output import say
    from cabochon.generation.remote import generate
    from cabochon.generation.transport import Transport
    from cabochon.generation.vllm import connect

    tokenizer = tokenizer_of(path)
    key = os.environ.get("VLLM_API_KEY", "")
    endpoint = connect(Transport(url=url, api_key=key, notice=say))
    return partial(generate, endpoint), tokenizer
