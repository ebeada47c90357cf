"""Leaving autocast aside, for code that chooses its own types."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch.autocast changes nothing on `device`; free where it is off."""
    kind = device.type
    # A device without autocast (meta) refuses even to be asked whether it is on.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
