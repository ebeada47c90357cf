"""`cabochon merge average | slerp | ema | towards | cosine`: weights of several model folders."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from cabochon.cli.configuration import FLAT, parse
from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError

if TYPE_CHECKING:
    from cabochon.weights.formulas import Formula
    from cabochon.weights.geometry import TaskVectors

__all__ = [
    "KINDS",
    "AverageSettings",
    "CosineSettings",
    "EmaSettings",
    "Output",
    "SlerpSettings",
    "TowardsSettings",
    "main",
]

KINDS = {
    "average": "the weighted mean of models",
    "slerp": "task vectors combined along arcs (WARP)",
    "ema": "the moving average of successive checkpoints",
    "towards": "back towards the start of training (LITI)",
    "cosine": "lengths of task vectors and the angles between them; writes nothing",
}

S = TypeVar("S")

Models = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
Per = Literal["tensor", "block", "whole"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the merge is written, and how."""

    out: Path
    """The folder of the merge, which must be new."""
    dtype: Literal["stored", "float32", "bf16", "fp16"] = "stored"
    """The type of the weights that are written; stored: as the models have them, all the same."""
    shard_size: str = "4GB"
    """The most bytes of one safetensors file: 500MB, 4GB, 2GiB."""
    threads: int = 0
    """How many work at once; 0: one a core. It changes no result."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """Which models, and how much of each."""

    models: Models
    """Two or more model folders or runs (their newest checkpoint)."""
    weights: tuple[float, ...] = ()
    """One for each model, at least 0, of sum 1; equal ones if absent."""
    normalize: bool = False
    """Divide the weights by their sum first; without it another sum than 1 is refused."""
    output: Annotated[Output, FLAT]


@dataclass(frozen=True, kw_only=True)
class SlerpSettings:
    """Which models, where they come from, and how much of each."""

    models: Models
    """Two or more model folders or runs (their newest checkpoint)."""
    base: str
    """The model that they were all trained from."""
    weights: tuple[float, ...] = ()
    """One for each model, at least 0, of sum 1; of two, the second's is t. Equal if absent."""
    normalize: bool = False
    """Divide the weights by their sum first; without it another sum than 1 is refused."""
    per: Per = "block"
    """What has one angle: each tensor, each transformer block, the whole model."""
    mean: Literal["recursion", "symmetric"] = "recursion"
    """More than two models: WARP's recursion (their order matters), or the mean of the directions
    on the sphere (it does not)."""
    output: Annotated[Output, FLAT]


@dataclass(frozen=True, kw_only=True)
class EmaSettings:
    """Which checkpoints, in the order of training."""

    models: Models
    """Two or more model folders, the earliest first."""
    decay: float
    """What the average so far keeps at each checkpoint, in [0, 1]."""
    output: Annotated[Output, FLAT]


@dataclass(frozen=True, kw_only=True)
class TowardsSettings:
    """Which model, and where it came from."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model folder or a run (its newest checkpoint)."""
    start: str
    """The model that training began with."""
    eta: float
    """How far from the start: 1 is the model, 0 the start."""
    output: Annotated[Output, FLAT]


@dataclass(frozen=True, kw_only=True)
class CosineSettings:
    """Which models, and where they come from."""

    models: Models
    """One or more model folders or runs (their newest checkpoint)."""
    base: str
    """The model that they were all trained from."""
    per: Per = "block"
    """What is a row: each tensor, each transformer block, the whole model."""
    threads: int = 0
    """How many work at once; 0: one a core. It changes no result."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


def main(argv: Sequence[str]) -> int:
    """Dispatches on the formula."""
    if argv and argv[0] in {"-h", "--help"}:
        print("usage: cabochon merge HOW ...\n")
        for name, purpose in KINDS.items():
            print(f"  {name:<8}  {purpose}")
        print("\ncabochon merge HOW --help lists the options.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"merge how? cabochon merge {' | '.join(KINDS)} ...")
    if argv[0] not in KINDS:
        raise ConfigError(unknown("verb of merge", argv[0], KINDS))
    # Angles are taken in threads of our own; those of the linear algebra library would be more.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run = {
        "average": _average, "slerp": _slerp, "ema": _ema, "towards": _towards, "cosine": _cosine,
    }[argv[0]]  # fmt: skip
    return run(argv[1:])


def _average(argv: Sequence[str]) -> int:
    settings = _parsed(AverageSettings, argv, "average")
    from cabochon.weights import formulas

    _several(settings.models)
    weights = _weights(settings.weights, normalize=settings.normalize)
    formula = formulas.averaged(len(settings.models), weights)
    return _merge(formula, settings.models, None, settings.output)


def _slerp(argv: Sequence[str]) -> int:
    settings = _parsed(SlerpSettings, argv, "slerp")
    from cabochon.weights import formulas

    _several(settings.models)
    weights = _weights(settings.weights, normalize=settings.normalize)
    formula = formulas.slerp(len(settings.models), weights, per=settings.per, mean=settings.mean)
    return _merge(formula, settings.models, settings.base, settings.output)


def _ema(argv: Sequence[str]) -> int:
    settings = _parsed(EmaSettings, argv, "ema")
    from cabochon.weights import formulas

    _several(settings.models)
    formula = formulas.ema(len(settings.models), settings.decay)
    return _merge(formula, settings.models, None, settings.output)


def _towards(argv: Sequence[str]) -> int:
    settings = _parsed(TowardsSettings, argv, "towards")
    from cabochon.weights import formulas

    formula = formulas.towards(settings.eta)
    return _merge(formula, [settings.model], settings.start, settings.output)


def _merge(formula: Formula, models: Sequence[str], base: str | None, output: Output) -> int:
    from cabochon.cli.lineage import strangers
    from cabochon.cli.output import answer, say
    from cabochon.weights.folders import merge

    folders, start = [_folder(model) for model in models], None if base is None else _folder(base)
    unrelated = [] if start is None else strangers(folders, start)
    record = merge(
        formula,
        folders,
        output.out,
        base=start,
        dtype=output.dtype,
        shard_bytes=_bytes(output.shard_size),
        workers=_workers(output.threads),
    )
    record = {**record, "remarks": [*record["remarks"], *unrelated]}
    for remark in record["remarks"]:
        say(f"remark: {remark}")
    if output.json:
        answer({"out": output.out.resolve(), **record})
    else:
        say(record["formula"])
        print(output.out)
    return 0


def _cosine(argv: Sequence[str]) -> int:
    settings = _parsed(CosineSettings, argv, "cosine")
    from cabochon.cli.lineage import strangers
    from cabochon.cli.output import answer, say
    from cabochon.weights.folders import task_vectors
    from cabochon.weights.geometry import together

    if not settings.models:
        raise ConfigError("of which models? cabochon merge cosine MODEL ... --base MODEL")
    base, models = _folder(settings.base), [_folder(model) for model in settings.models]
    vectors, remarks = task_vectors(base, models, settings.per, workers=_workers(settings.threads))
    for remark in [*remarks, *strangers(models, base)]:
        say(f"remark: {remark}")
    rows = {**vectors, "all": together(vectors.values())}
    if settings.json:
        answer(
            {
                "base": settings.base,
                "models": settings.models,
                "per": settings.per,
                "groups": {group: _described(each) for group, each in rows.items()},
            }
        )
    else:
        _print_table(settings.models, rows)
    return 0


def _described(vectors: TaskVectors) -> dict[str, Any]:
    return {
        "norms": vectors.norms.tolist(),
        "cosines": [
            [None if math.isnan(cosine) else cosine for cosine in row]
            for row in vectors.cosines.tolist()
        ],
        "elements": vectors.elements,
    }


def _print_table(models: Sequence[str], rows: dict[str, TaskVectors]) -> None:
    """One line a group: the length of every task vector, the cosine of every pair."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("task vectors")
    pairs = [(i, j) for i in range(len(models)) for j in range(i)]
    for place, model in enumerate(models, 1):
        table.add_column(f"|{place}|", justify="right")
        print(f"{place}: {model}")
    for i, j in pairs:
        table.add_column(f"cos {j + 1},{i + 1}", justify="right")
    for group, vectors in rows.items():
        cosines = vectors.cosines
        table.add_row(
            group,
            *(f"{norm:.4g}" for norm in vectors.norms),
            *("-" if math.isnan(cosines[i, j]) else f"{cosines[i, j]:.4f}" for i, j in pairs),
        )
    Console(highlight=False, soft_wrap=True).print(table)


def _several(models: Sequence[str]) -> None:
    if len(models) < 2:
        raise ConfigError(
            f"a merge needs two models or more, got {len(models)}; cabochon export copies one"
        )


def _weights(weights: Sequence[float], *, normalize: bool) -> Sequence[float] | None:
    """None where no weights are given."""
    total = math.fsum(weights)
    sound = bool(weights) and total > 0 and min(weights) >= 0
    if not sound or not normalize:  # what is wrong is said where it is used
        return weights or None
    return [weight / total for weight in weights]


def _folder(path: str) -> Path:
    """The model folder that `path` means; finding and checking a run's checkpoint needs torch."""
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder.parent / "checksums.json").is_file():
        return folder
    from cabochon.cli.machine import model_folder

    return model_folder(path)


def _bytes(size: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        count = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as error:
        raise ConfigError(f"--shard-size {size!r} is no size; say 500MB, 4GB or 2GiB") from error
    if count < 1:
        raise ConfigError(f"--shard-size must be at least one byte, got {size}")
    return count


def _workers(threads: int) -> int:
    if threads < 0:
        raise ConfigError(f"--threads must be at least 0, got {threads}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or min(cores or 1, 16)


def _parsed(cls: type[S], argv: Sequence[str], kind: str) -> S:
    purpose = KINDS[kind]
    description = f"{purpose[0].upper()}{purpose[1:]}."
    return parse(cls, argv, prog=f"cabochon merge {kind}", description=description)
