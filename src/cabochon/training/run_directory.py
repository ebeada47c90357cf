"""Run directories: what a run began with, and the lock of the process that writes it.

RUN/
  config.yaml       as resolved by the caller
  manifest.json     what the run depends on: the config's text, seed, hashes, versions
  metrics.jsonl     one line an update
  checkpoints/      step-N, where N updates have been made
  lock              held by the process that writes the run
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import unified_diff
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from cabochon.core.errors import FolderError, RunChanged
from cabochon.files import whole
from cabochon.training.parallel import ranks

__all__ = ["Run", "create"]


@dataclass(frozen=True)
class Run:
    """A run directory that exists."""

    folder: Path

    def __post_init__(self) -> None:
        for needed in ("config.yaml", "manifest.json"):
            if not (self.folder / needed).is_file():
                raise FolderError(f"{self.folder} is not a run directory: it has no {needed}")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def config(self) -> str:
        """The text of config.yaml."""
        return (self.folder / "config.yaml").read_text(encoding="utf-8")

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json.

        Raises:
            FolderError: it is not JSON.
        """
        path = self.folder / "manifest.json"
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FolderError(f"{path} is damaged ({error}); begin the run again") from error
        if missing := {"config", "inputs", "environment"} - content.keys():
            raise FolderError(
                f"{path} is damaged (it has no {', '.join(sorted(missing))}); begin the run again"
            )
        return content

    def refuse_changes(self, config: str, inputs: Mapping[str, Any]) -> None:
        """Compares what the run began with and what it would now go on with.

        Args:
            config: the resolved config as it is now.
            inputs: as given to `create`.

        Raises:
            RunChanged: shows each line of the config and each input that differs.
        """
        began = self.manifest()
        lines = [
            line
            for line in unified_diff(began["config"].splitlines(), config.splitlines(), n=0)
            if not line.startswith(("---", "+++", "@@"))
        ]
        before, now = _flat(began["inputs"]), _flat(inputs)
        lines += [
            f"{key}: was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys())
            if key not in before or key not in now or before[key] != now[key]
        ]
        if lines:
            listing = "\n  ".join(lines)
            raise RunChanged(
                f"{self.folder} began with other settings or files than it would go on with:\n"
                f"  {listing}\nput them back as they were, or begin a new run"
            )

    def environment_changes(self) -> list[str]:
        """Versions, machine or threads other than at the beginning, which may change last bits."""
        before, now = _flat(self.manifest()["environment"]), _flat(_environment())
        return [
            f"{key}: was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process can write the run; a killed process holds no lock.

        Raises:
            FolderError: another process writes it.
        """
        with self._opened_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = file.read().strip() or "another process"
                raise FolderError(
                    f"{self.folder} is being written by {holder}; wait for it or stop it first"
                ) from error
            self._sign(file)
            yield

    def _opened_lock(self) -> TextIO:
        path = self.folder / "lock"
        try:
            path.touch()
            return path.open("r+", encoding="utf-8")
        except OSError as error:
            raise FolderError(f"could not lock {self.folder}: {error}") from error

    def _sign(self, lock: TextIO) -> None:
        """Says who holds the lock; on a full disk it holds without a name."""
        with contextlib.suppress(OSError):
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def create(folder: Path, *, config: str, inputs: Mapping[str, Any]) -> Run:
    """A new run directory, made aside and renamed: it is there in full or not at all.

    Args:
        folder: must not exist, or be empty.
        config: the resolved config, the text of config.yaml.
        inputs: JSON values, nested as you like, that must be the same when the run is resumed:
            the seed, hashes of the data, of the tokenizer and of the weights it starts from.

    Raises:
        FolderError: the folder exists, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        advice = "resume that run, or choose" if (folder / "manifest.json").exists() else "choose"
        raise FolderError(f"{folder} exists already; {advice} another folder")
    manifest = {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        "inputs": inputs,
        "environment": _environment(),
    }
    try:
        with whole(folder) as partial:
            (partial / "checkpoints").mkdir(parents=True)
            (partial / "config.yaml").write_text(config, encoding="utf-8")
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (partial / "metrics.jsonl").touch()
    except OSError as error:
        raise FolderError(f"could not make the run directory {folder}: {error}") from error
    return Run(folder)


def _environment() -> dict[str, Any]:
    return {
        "cabochon": version("cabochon"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "ranks": ranks(),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            # As JSON gives it back, so that a tuple equals the list it was saved as.
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
