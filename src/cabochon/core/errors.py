"""Every error raised on purpose, in one tree.

    CabochonError
    |- ConfigError (ValueError)        a setting is unknown, of the wrong type or out of range
    |- DataError (ValueError)          text, records or token files cannot be used as they are
    |- TokenizerMismatch (ValueError)  a tokenizer is not the one its model was made with
    |- WeightsMismatch (ValueError)    tensors missing, surplus, or of another shape or type
    |- FolderError (OSError)           a model folder or run directory is absent or incomplete
    |- CheckpointError (OSError)       a checkpoint is damaged or could not be written
    |- RunChanged (RuntimeError)       resuming with another config, data or weight file
    |- NonFinite (ArithmeticError)     a loss or a gradient is NaN or infinite
    |  |- Diverged                     a policy has left what it was to stay close to
    |- ServerError (OSError)           a server cannot be reached, refuses, or answers nonsense
    |- ActorDied (RuntimeError)        an actor was killed, raised or hung; what it owed is not done
    |- Closed (RuntimeError)           a queue or a runtime is closed; whoever works for it ends
    |- MissingExtra (ImportError)      an optional part is not installed

Each message says what came, what was expected and what to do. The second parent lets callers who
know only Python's own errors catch them too.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ActorDied",
    "CabochonError",
    "CheckpointError",
    "Closed",
    "ConfigError",
    "DataError",
    "Diverged",
    "FolderError",
    "MissingExtra",
    "NonFinite",
    "RunChanged",
    "ServerError",
    "TokenizerMismatch",
    "WeightsMismatch",
]


class CabochonError(Exception):
    """Everything that cabochon raises on purpose."""


class ConfigError(CabochonError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(CabochonError, ValueError):
    """Text, records or token files cannot be used as they are."""


class TokenizerMismatch(CabochonError, ValueError):
    """A tokenizer is not the one its model was made with."""


class WeightsMismatch(CabochonError, ValueError):
    """Tensors are missing, surplus, or of another shape or type than the model's."""


class FolderError(CabochonError, OSError):
    """A model folder or run directory is absent or incomplete."""


class CheckpointError(CabochonError, OSError):
    """A checkpoint is damaged or could not be written."""


class RunChanged(CabochonError, RuntimeError):
    """A run is resumed with another config, data file or weight file than it began with."""


class NonFinite(CabochonError, ArithmeticError):
    """A loss, a gradient or a logit is NaN or infinite.

    Attributes:
        finished: what was completed all the same; nothing of that is lost.
    """

    finished: Sequence[object] = ()


class Diverged(NonFinite):
    """A policy has left what it was to stay close to; training on would only make it worse."""


class ServerError(CabochonError, OSError):
    """A server cannot be reached, refuses, or answers what cannot be used.

    Attributes:
        status: the HTTP status; None where no answer came.
        finished: what had been completed before, by its index; nothing of that is lost.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.finished: dict[int, object] = {}


class ActorDied(CabochonError, RuntimeError):
    """An actor is gone, and what it was asked for has not been done.

    Attributes:
        actor: its name.
        cause: what it died of.
    """

    def __init__(self, actor: str, cause: str) -> None:
        super().__init__(f"actor {actor} died: {cause}")
        self.actor = actor
        self.cause = cause


class Closed(CabochonError, RuntimeError):
    """A queue or a runtime is closed: nothing more comes out of it or goes into it."""


class MissingExtra(CabochonError, ImportError):
    """An optional part is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; install it: pip install 'cabochon[{extra}]'")
