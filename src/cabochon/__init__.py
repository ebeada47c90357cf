"""Shape and polish small language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cabochon.folders import load, save

__all__ = ["__version__", "load", "save"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`load` and `save` bring torch with them, so they come when they are asked for."""
    if name in ("load", "save"):
        from cabochon import folders

        return getattr(folders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
