"""One token a row as one call: compiled, and on CUDA recorded as a graph.

A step of decoding is some three hundred small operations whose calls cost more than their
arithmetic. `torch.compile` makes a few dozen of them; on CUDA a graph replays those as one launch.
What is compiled is the arithmetic of `Step` and of `few`, with all tensors as inputs, so that
neither new weights nor a new cache have to be compiled again; nor are other lengths, nor another
number of rows, a single one apart.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any
from weakref import ReferenceType, finalize, ref

import torch
from torch import Tensor
from torch.nn.functional import embedding

from cabochon.core.errors import ConfigError
from cabochon.core.types import TokenBatch
from cabochon.models.gemma.cache import GemmaCache, Sight
from cabochon.models.gemma.cuda_attention import NARROWEST_FLEX_HEAD
from cabochon.models.gemma.few import attend_few, attend_few_fused, hidden, places
from cabochon.models.gemma.step import Product, Step

__all__ = ["CompiledStep", "Logits", "refuse_without_compiler"]

_ROUND = {"cpu": 16, "cuda": 128}
"""Slots are read by the multiple: each number of them is a graph of its own on CUDA."""

_LIBRARY = torch.library.Library("cabochon", "DEF")
_LIBRARY.define("product(Tensor x, int handle, int width) -> Tensor")
_PRODUCTS: dict[int, Product] = {}
"""Products with weights in a layout that the compiler does not know, by handle."""
_HANDLES = count()


def _product(x: Tensor, handle: int, width: int) -> Tensor:  # noqa: ARG001
    return _PRODUCTS[handle](x)


def _product_shape(x: Tensor, handle: int, width: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], width)


_LIBRARY.impl("product", _product, "CPU")
_LIBRARY.impl("product", _product_shape, "Meta")


def refuse_without_compiler() -> None:
    """Say that there is no C++ compiler before anything waits for one.

    Raises:
        ConfigError: none is found.
    """
    wanted = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"compiled decoding needs a C++ compiler and none of {', '.join(wanted)} is there; "
            "install one, name it in CXX, or decode without compiling"
        )


@dataclass(frozen=True, kw_only=True)
class Logits:
    """A prediction whose logits are there already."""

    all: Tensor
    """(B T) V float32."""

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V: of the chosen rows of the flattened (B T) positions."""
        return self.all[rows]


class CompiledStep:
    """A model's decoding of single tokens, compiled when it is first asked for."""

    def __init__(self, backend: str = "inductor") -> None:
        """Nothing is compiled yet.

        Args:
            backend: of `torch.compile`.
        """
        self.step: Step | None = None
        """The weights laid out, as `step` of a cache."""
        self.rows = 0
        """For how many rows they are."""
        self._handles: list[int] = []
        finalize(self, _forget, self._handles)
        # The compiler keeps what it made with the code object, of which each model needs its own.
        code = _run.__code__.replace()
        own = FunctionType(code, _run.__globals__, _run.__name__)
        options: dict[str, Any] = {"guard_filter_fn": _inputs_alone}
        self._run = torch.compile(own, fullgraph=True, backend=backend, options=options)
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        self._recorded_for: tuple[Step, ReferenceType[Tensor]] | None = None

    def opaque(self) -> Callable[[Product, int], Product]:
        """Products as calls that the compiler leaves alone; from now on these, not the last ones.

        They get the same handles in the same order, so that what was compiled calls them.
        """
        number = iter(range(1_000_000))

        def call(product: Product, width: int) -> Product:
            at = next(number)
            if at == len(self._handles):
                self._handles.append(next(_HANDLES))
            handle = self._handles[at]
            _PRODUCTS[handle] = product
            return lambda x: torch.ops.cabochon.product.default(x, handle, width)

        return call

    def __call__(
        self, batch: TokenBatch, cache: GemmaCache, weight: Tensor, scale: float
    ) -> Logits:
        """Predictions after one new token a row.

        Args:
            batch: B 1.
            cache: what holds its past.
            weight: V D: the embedding.
            scale: of the embeddings.
        """
        assert self.step is not None
        sights = cache.sights(batch, _ROUND[weight.device.type], whole=weight.is_cuda)
        _mark(batch, cache, sights)
        if weight.is_cuda:
            return Logits(all=self._replay(batch, cache, sights, weight, scale))
        inputs = (batch.tokens, batch.positions, batch.documents)
        return Logits(all=self._run(self.step, weight, scale, *inputs, cache.memories, sights))

    def _replay(
        self,
        batch: TokenBatch,
        cache: GemmaCache,
        sights: list[Sight],
        weight: Tensor,
        scale: float,
    ) -> Tensor:
        step, memories = self.step, cache.memories
        assert step is not None
        made_for = self._recorded_for
        if made_for is None or made_for[0] is not step or made_for[1]() is not memories[0]:
            self._graphs.clear()
            self._recorded_for = (step, ref(memories[0]))
        key = tuple(len(sight.slots) for sight in sights)
        if key not in self._graphs:

            def run(tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
                found: Tensor = self._run(
                    step, weight, scale, tokens, positions, documents, memories, sights
                )
                return found

            self._graphs[key] = _Recorded(run, cache.room, weight.device)
        return self._graphs[key](batch)


class _Recorded:
    """A function of one token a row as a CUDA graph, with the memory it reads and writes."""

    def __init__(
        self, run: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, device: torch.device
    ) -> None:
        def column(value: int) -> Tensor:
            return torch.full((rows, 1), value, dtype=torch.int64, device=device)

        # Padding, so that recording leaves nothing in the cache.
        self._inputs = column(0), column(0), column(-1)
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                run(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found = run(*self._inputs)

    def __call__(self, batch: TokenBatch) -> Tensor:
        """B V float32; rows that the batch lacks are padding."""
        rows = len(batch.tokens)
        given = (batch.tokens, batch.positions, batch.documents)
        for mine, theirs in zip(self._inputs, given, strict=True):
            mine[:rows].copy_(theirs)
        self._inputs[2][rows:] = -1
        self._graph.replay()
        return self._found[:rows].clone()


def _mark(batch: TokenBatch, cache: GemmaCache, sights: list[Sight]) -> None:
    """Say which sizes change, so that one compilation serves them all."""
    mark = torch._dynamo.maybe_mark_dynamic
    for tensor in (batch.tokens, batch.positions, batch.documents):
        mark(tensor, 0)
    for sight in sights:
        mark(sight.slots, 0)
        mark(sight.lines, 0)
    for memory in cache.memories:
        mark(memory, [1, 2])


def _run(
    step: Step,
    weight: Tensor,
    scale: float,
    tokens: Tensor,
    positions: Tensor,
    documents: Tensor,
    memories: list[Tensor],
    sights: list[Sight],
) -> Tensor:
    """B V float32: logits after one new token a row, which is remembered unless it is padding."""
    fused = weight.is_cuda and step.config.head_width >= NARROWEST_FLEX_HEAD
    attend = attend_few_fused if fused else attend_few
    attends = []
    for memory, sight in zip(memories, sights, strict=True):
        size = memory.shape[2] - 1
        slot = positions % size if sight.ring else positions
        slot = torch.where(documents >= 0, slot, size)
        window = size if sight.window is None else sight.window
        place = positions[:, None, :, None]
        unseen = (
            sight.slots > place
            if sight.window is None
            else hidden(place, sight.slots, window, size)
        )
        bias = torch.where(unseen, -torch.inf, 0.0)
        attends.append(attend(step.config, memory, places(sight.lines, slot), bias))
    return step(embedding(tokens, weight) * scale, positions, attends).logits(slice(None))


def _inputs_alone(guards: Any) -> list[bool]:
    """Look only at what changes from call to call; a step and its weights are always alike."""
    kept = {"tokens", "positions", "documents", "memories", "sights"}
    return [
        guard.guard_type == "SHAPE_ENV" or re.split(r"[.\[]", guard.name)[0] in kept
        for guard in guards
    ]


def _forget(handles: list[int]) -> None:
    for handle in handles:
        _PRODUCTS.pop(handle, None)
