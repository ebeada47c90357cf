"""Several processes that train one model, started by torchrun; with one process, nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

from cabochon.training import parallel
from cabochon.training.run_directory import Run

__all__ = ["begun_by_first", "joined"]


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within the block the processes that torchrun started know each other; rank 0 alone speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with ExitStack() as stack:
            if parallel.rank() > 0:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        dist.destroy_process_group()


def begun_by_first(create: Callable[[], Run], folder: Path, device: torch.device) -> Run:
    """The run that rank 0 creates in `folder`, opened by the others once it is there."""
    parallel.wait_for_all(device)  # nobody still looks whether the folder is free
    run = create() if parallel.rank() == 0 else None
    parallel.wait_for_all(device)
    return run or Run(folder)
