"""Content hashes of everything a run reads, so that resuming notices a change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cabochon import folders
from cabochon.cli.settings import RunSettings
from cabochon.data.corpus import standard_library
from cabochon.data.documents import content_hash
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import hashes_below, sha256_of

__all__ = ["fingerprints"]


def fingerprints(
    run: RunSettings, tokenizer: Tokenizer, models: Mapping[str, Path]
) -> dict[str, Any]:
    """Seed, tokenizer, data files and weight files, as a run's manifest keeps them."""
    return {
        "seed": run.seed,
        "tokenizer": tokenizer.fingerprint(),
        "data": {source: _content(source) for source in run.data},
        "weights": {name: folders.fingerprint(folder) for name, folder in models.items()},
    }


def _content(source: str) -> str | dict[str, str]:
    if source == "stdlib":
        return content_hash(standard_library().train)
    path = Path(source)
    if path.is_dir():
        return hashes_below(path)
    return sha256_of(path)
