"""How much memory an update takes and writes, found by running it on tensors without contents.

On torch's device "meta" every operation happens in shape only. Counting what it allocates and
frees gives the peak of a real update without spending one, and follows the code that is really run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AllocationMeter"]

_aten = torch.ops.aten


class AllocationMeter(TorchDispatchMode):
    """Within the block, the bytes of all tensors that are made there and still held.

    Where the code asks a tensor without contents for its contents, it is told what makes the most
    work: every position counts, and every number is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        """Bytes held now."""
        self.peak = 0
        """The most bytes that were held at once."""
        self.written = 0
        """Bytes of all results so far, those written over something included."""
        self.operations = 0
        """How many operations gave them; views of what is there already do not count."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operation and notes the storages that it made."""
        if function is _aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if function is _aten.nonzero.default and args[0].is_meta:
            result: Any = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
                if not _is_view(function):
                    self.written += value.numel() * value.element_size()
        self.operations += not _is_view(function)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size


def _is_view(function: Any) -> bool:
    """True where the result is neither new nor written over: another look at an input."""
    kinds = [each.alias_info for each in function._schema.returns]
    return any(kind is not None and not kind.is_write for kind in kinds)
