"""Further places for metrics beside metrics.jsonl: TensorBoard event files and trackio.

Each is made of a package that is an extra, and is a function that takes a `Record`, so that it can
be handed to `supervise` as an observer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cabochon.core.errors import MissingExtra
from cabochon.training.metrics import Record

__all__ = ["Meter", "tensorboard", "trackio"]

Meter = Callable[[Record], None]
"""Takes each update once it has been recorded."""


@contextmanager
def tensorboard(folder: Path, *, start: int = 0) -> Iterator[Meter]:
    """Scalars in an event file below `folder`, closed at the end of the block.

    A resumed run writes a further file; TensorBoard drops what earlier files hold from `start` on.

    Raises:
        MissingExtra: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboardX", "track", "metrics for TensorBoard") from error
    writer = SummaryWriter(str(folder), purge_step=start or None)

    def record(one: Record) -> None:
        for name, value in _numbers(one).items():
            writer.add_scalar(name, value, one.step.index)

    try:
        yield record
    finally:
        writer.close()


@contextmanager
def trackio(project: str, name: str, config: Mapping[str, Any]) -> Iterator[Meter]:
    """A run of trackio's local dashboard (`trackio show`), finished at the end of the block.

    Nothing leaves the machine: no space is named and analytics are off. It is kept where trackio
    keeps all runs; the environment variable TRACKIO_DIR names another folder.

    Args:
        project: the dashboard's project.
        name: the run within it; the same name goes on with the same run.
        config: shown beside the curves.

    Raises:
        MissingExtra: trackio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import trackio as tracker
    except ImportError as error:
        raise MissingExtra("trackio", "track", "metrics for trackio") from error
    run = tracker.init(
        project=project,
        name=name,
        config=dict(config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        yield lambda one: run.log(_numbers(one), step=one.step.index)
    finally:
        run.finish()


def _numbers(record: Record) -> dict[str, float]:
    """What can be drawn: a line of metrics.jsonl without the step and what is not finite."""
    line = record.as_json()
    return {k: float(v) for k, v in line.items() if k != "step" and math.isfinite(v)}
