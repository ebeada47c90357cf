"""What a run will take: memory, arithmetic and speed, without making an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cabochon.cli.machine import DTYPES
from cabochon.cli.memory import AllocationMeter
from cabochon.cli.recipe import Recipe
from cabochon.cli.settings import RunSettings
from cabochon.core import TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.models.gemma.config import GemmaConfig, parameter_counts
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.hf_config import config_from_hf
from cabochon.training.precision import master_of
from cabochon.weight_files import read_json, weight_files

__all__ = [
    "Memory",
    "Speed",
    "Work",
    "checkpoint_bytes",
    "folder_config",
    "measured_speed",
    "rehearse",
    "resident_bytes",
    "stored_bytes",
]

STARTING = 95 * 2**20
"""Bytes that a process takes with its first update beside its tensors: stacks of threads, code and
buffers of the libraries. Measured on Linux."""

KEPT = 0.8, 60 * 2**20
"""Of the activations that are freed, the allocator keeps about this share, and at most so much."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of an update, by what they hold."""

    weights: int
    """The model, its float32 masters, and the moving average where there is one."""
    teacher: int
    optimizer: int
    gradients: int
    activations: int
    """Whatever else an update holds at its peak: activations, logits, buffers."""
    process: int
    """Interpreter, libraries, data, and what the allocator keeps; 0 on a GPU."""
    judges: int = 0
    """The weights of reward models."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an update computes."""

    flops: float
    """Multiplications and additions in its matrix products."""
    written_bytes: float
    """Results of all its operations together."""
    operations: int

    def seconds(self, speed: Speed) -> float:
        """How long it takes where the three costs add up."""
        return (
            self.flops / speed.flops_per_second
            + self.written_bytes / speed.written_bytes_per_second
            + self.operations * speed.seconds_per_operation
        )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine does, tried for half a second."""

    flops_per_second: float
    """Of a matrix product of the model's size."""
    written_bytes_per_second: float
    """Of an elementwise operation of the model's size."""
    seconds_per_operation: float
    """Of an operation with nothing to do."""


def rehearse(
    recipe: Recipe[Any], settings: Any, config: GemmaConfig, teacher: GemmaConfig | None
) -> tuple[Memory, Work]:
    """An update, made on tensors without contents.

    Args:
        recipe: whose objective is used.
        settings: sizes and precision.
        config: the shape of the model that learns.
        teacher: the shape of its teacher; None for none.
    """
    run: RunSettings = settings.run
    dtype, accumulate = DTYPES[run.precision], int(settings.method.accumulate)
    before_all = resident_bytes()
    with AllocationMeter() as meter:
        again = run.checkpoint_activations
        model = Gemma(config, checkpoint_activations=again, device="meta", dtype=dtype)
        masters = [master_of(parameter) for parameter in model.parameters()]
        average = [torch.empty_like(each) for each in masters if run.ema]
        marks = [meter.held]
        teaching = None
        if teacher is not None:
            teaching = Gemma(teacher, device="meta", dtype=dtype).requires_grad_(False)
        marks.append(meter.held)
        moments = [torch.empty_like(each) for each in (*masters, *masters)]
        marks.append(meter.held)
        objective = recipe.objective(settings, teaching)
        batch = _batch(run.batch_size, run.context)
        before = meter.written, meter.operations
        repeats = min(2, accumulate)
        for _ in range(repeats):
            objective(model, batch).total.backward()
        marks.append(meter.held)
    weights, teaches, moves, gradients = (
        after - before for before, after in zip([0, *marks], marks, strict=False)
    )
    activations = meter.peak - marks[-1]
    share, most = KEPT
    kept = min(share * activations, most)
    on_cpu = not run.device.startswith("cuda")
    memory = Memory(
        weights=weights,
        teacher=teaches,
        optimizer=moves,
        gradients=gradients,
        activations=activations,
        process=int(before_all + STARTING + kept) if on_cpu else 0,
    )
    del average, moments
    times = accumulate / repeats
    work = Work(
        flops=_flops(config, teacher, run) * accumulate,
        # The optimizer writes weights and both moments, and the norm reads the gradients.
        written_bytes=(meter.written - before[0]) * times + 4 * moves,
        operations=int((meter.operations - before[1]) * times) + 4 * len(masters),
    )
    return memory, work


def folder_config(folder: Path) -> GemmaConfig:
    """The shape of a Gemma folder, without its weights.

    Raises:
        ConfigError: it is another family's.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") not in ("gemma", "gemma2"):
        raise ConfigError(
            f"{folder} is of the family {values.get('model_type')!r}; plan knows Gemma's "
            "arithmetic alone (train and doctor take any)"
        )
    return config_from_hf(values)


def stored_bytes(folder: Path) -> int:
    """Bytes of a folder's weights, which is what they take in memory where nothing casts them."""
    return sum(each.stat().st_size for each in weight_files(folder))


def checkpoint_bytes(config: GemmaConfig, run: RunSettings) -> int:
    """Bytes of one checkpoint: weights, masters, two moments, the moving average."""
    count = sum(parameter_counts(config))
    stored, masters = (2, 4) if run.precision == "bf16" else (4, 0)
    return count * (stored + masters + 8 + (4 if run.ema else 0))


def measured_speed(rows: int, config: GemmaConfig, dtype: torch.dtype, device: str) -> Speed:
    """What this machine does at the moment."""
    # As large as in the model, but never so large that trying costs what it is to foretell.
    width, ffn_width = min(config.width, 2048), min(2 * config.ffn_width, 4096)
    x = torch.ones(min(rows, 1024), width, dtype=dtype, device=device)
    weight = torch.ones(ffn_width, width, dtype=dtype, device=device)
    wide = torch.ones(len(x), len(weight), dtype=torch.float32, device=device)
    one = torch.ones(1, device=device)
    other = torch.empty_like(wide)
    with torch.no_grad():
        product = _seconds_of(lambda: x @ weight.T)
        elementwise = _seconds_of(lambda: torch.mul(wide, 2.0, out=other))
        nothing = _seconds_of(lambda: one * 2.0)
    return Speed(
        flops_per_second=2.0 * x.numel() * len(weight) / product,
        written_bytes_per_second=4.0 * wide.numel() / elementwise,
        seconds_per_operation=nothing,
    )


def _seconds_of(work: Callable[[], Tensor], *, trial: float = 0.15) -> float:
    """Mean over as many calls as fit into `trial` seconds."""
    work()[0].sum().item()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < trial:
        for _ in range(4):
            last = work()
        last[0].sum().item()  # a GPU works behind: wait for it
        count += 4
    return (time.perf_counter() - begin) / count


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (its peak, where /proc is not to be read)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        from cabochon.training.process_memory import peak_memory

        return peak_memory()
    import resource

    return pages * resource.getpagesize()


def _flops(config: GemmaConfig, teacher: GemmaConfig | None, run: RunSettings) -> float:
    """Multiplications and additions in the matrix products of one micro-batch.

    A product costs as much again for each of its two gradients; blocks whose activations are made
    twice cost one more forward pass; a teacher costs its forward pass.
    """
    block, head = _forward_flops(config, run.context)
    each = (4 if run.checkpoint_activations else 3) * block + 3 * head
    if teacher is not None:
        each += sum(_forward_flops(teacher, run.context))
    return run.batch_size * run.context * each


def _forward_flops(config: GemmaConfig, context: int) -> tuple[float, float]:
    """Per token: of all blocks, and of the unembedding."""
    embedding, rest = parameter_counts(config)
    attention = 4 * context * config.heads * config.head_width * config.layers
    return 2.0 * rest + attention, 2.0 * embedding


def _batch(rows: int, length: int) -> TokenBatch:
    whole = torch.ones(rows, length, dtype=torch.int64, device="meta")
    return TokenBatch(
        tokens=whole,
        positions=whole.clone(),
        documents=whole.clone(),
        targets=whole.clone(),
        mask=torch.ones(rows, length, dtype=torch.bool, device="meta"),
    )
