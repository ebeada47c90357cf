"""times.json: how long the stages of a pipeline took that keep no metrics, and its peak memory.

Apart from the results, because these figures differ from one run to the next and nothing else does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cabochon.files import write_whole
from cabochon.training.process_memory import peak_memory

__all__ = ["note_memory", "timed", "write_json"]


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Notes the seconds that the block took, unless it fails."""
    begin = time.perf_counter()
    yield
    times = _read(folder)
    times["seconds"][stage] = round(time.perf_counter() - begin, 3)
    write_json(folder / "times.json", times)


def note_memory(folder: Path) -> None:
    """Notes the most memory that this process has held, if it is the most so far."""
    times = _read(folder)
    times["peak_memory_bytes"] = max(peak_memory(), times["peak_memory_bytes"])
    write_json(folder / "times.json", times)


def write_json(path: Path, content: Any) -> None:
    """The file `path` with this content: there in full, or as it was."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "times.json"
    if not path.is_file():
        return {"seconds": {}, "peak_memory_bytes": 0}
    return dict(json.loads(path.read_text("utf-8")))
