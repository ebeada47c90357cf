"""Checkpoints that are either whole or absent.

A checkpoint is written beside its place, every file and folder is flushed to the disk, and one
rename makes it visible; only then are older ones pruned. A crash at any moment leaves the earlier
checkpoints as they were and at most a folder whose name begins with a dot. `checksums.json` holds
the SHA-256 of every other file and of itself, so any changed byte is found and named.

    step-N/
      model/                  an HF folder, written and read by the caller's functions
      optimizer.safetensors   state of the optimizer and float32 masters
      ema.safetensors         the moving average, when there is one
      extra.safetensors       what else moves with the updates (an anchor), when there is any
      state.json              step and settings
      checksums.json
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from cabochon import files
from cabochon.core.errors import CheckpointError
from cabochon.training import optimizer_state

__all__ = [
    "TrainingState",
    "clean",
    "completed",
    "discard_after",
    "prune",
    "read",
    "read_newest",
    "verify",
    "write",
]

_FORMAT = 1
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds besides the step; data and schedule are functions of the step."""

    save_model: Callable[[Path], None]
    """Writes the model into a folder that does not exist yet."""
    load_model: Callable[[Path], None]
    """Reads such a folder into the parameters that the optimizer, or its masters, stand for."""
    optimizer: Optimizer
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    """A moving average of the weights, updated and restored in place; empty when there is none."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What else an algorithm carries from update to update, an anchor for one; as `ema`."""


def write(folder: Path, step: int, state: TrainingState) -> Path:
    """The path of a new checkpoint in `folder`, durable when this returns.

    Raises:
        CheckpointError: it could not be written, for want of space or another reason; earlier
            checkpoints are as they were and nothing of the new one is left.
    """
    final = folder / f"step-{step}"
    try:
        with files.whole(final) as partial:
            _write(partial, step, state)
            if final.exists():
                files.flush_tree(partial)
                _discard(final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write checkpoint {final}: {error}; {_free(folder)}; "
            f"earlier checkpoints are intact ({_listed(folder)}); make room, then resume"
        ) from error
    _remove(folder / f".discarded-step-{step}")
    return final


def read(path: Path, state: TrainingState) -> int:
    """Restores everything `state` refers to from a checkpoint; returns its step.

    Raises:
        CheckpointError: a file is damaged, missing or surplus, or belongs to another model.
    """
    verify(path)
    return _load(path, state)


def read_newest(folder: Path, state: TrainingState) -> int:
    """Restores the newest checkpoint in `folder`; 0 when there is none. Never silently an older.

    Raises:
        CheckpointError: as `read`; for damage, the newest checkpoint that is whole is named too.
    """
    paths = list(completed(folder).values())
    if not paths:
        return 0
    try:
        verify(paths[-1])
    except CheckpointError as error:
        whole = next((path for path in reversed(paths[:-1]) if _is_whole(path)), None)
        advice = (
            "no earlier checkpoint is whole: begin the run again"
            if whole is None
            else f"the newest that is whole is {whole.name}: resume with "
            f"--step {whole.name.removeprefix('step-')}"
        )
        raise CheckpointError(f"{error}; {advice}") from error
    return _load(paths[-1], state)


def verify(path: Path, *, part: str = "") -> None:
    """Reads every byte of a checkpoint and compares it with its checksums.

    Args:
        path: step-N.
        part: only what lies in this folder of it; everything by default.

    Raises:
        CheckpointError: names each file that is damaged, missing or surplus.
    """
    listing = path / _CHECKSUMS
    if not listing.is_file():
        raise CheckpointError(f"checkpoint {path} is damaged: {_CHECKSUMS} is missing")
    content = listing.read_bytes()
    try:
        recorded = json.loads(content)["files"]
        whole = content == _checksums(recorded)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"checkpoint {path} is damaged: {_CHECKSUMS} was changed")
    prefix = f"{part}/" if part else ""
    recorded = {name: digest for name, digest in recorded.items() if name.startswith(prefix)}
    present = {prefix + name: digest for name, digest in files.hashes_below(path / part).items()}
    present.pop(_CHECKSUMS, None)
    problems = [f"{name} is missing" for name in recorded if name not in present]
    problems += [f"{name} does not belong to it" for name in present if name not in recorded]
    problems += [
        f"{name} was changed"
        for name, digest in recorded.items()
        if name in present and present[name] != digest
    ]
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(sorted(problems))}")


def completed(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by step, oldest first; whole unless damaged since."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            number = path.name.removeprefix("step-")
            if path.is_dir() and path.name.startswith("step-") and number.isdecimal():
                found[int(number)] = path
    return dict(sorted(found.items()))


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Removes all checkpoints but the newest `keep` and the multiples of `keep_every`, if not 0."""
    found = completed(folder)
    for step in list(found)[: max(0, len(found) - keep)]:
        if not (keep_every and step % keep_every == 0):
            _discard(found[step])
            _remove(folder / f".discarded-{found[step].name}")


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints that are later than `step`."""
    for later, path in completed(folder).items():
        if later > step:
            _discard(path)
            _remove(folder / f".discarded-{path.name}")


def clean(folder: Path) -> None:
    """Removes what a write or a removal that was killed has left behind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".partial-step-", ".discarded-step-")):
                _remove(path)


def _write(partial: Path, step: int, state: TrainingState) -> None:
    partial.mkdir()
    state.save_model(partial / "model")
    save_file(optimizer_state.tensors_of(state.optimizer), partial / "optimizer.safetensors")
    for name, tensors in (("ema", state.ema), ("extra", state.extra)):
        if tensors:
            whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(whole, partial / f"{name}.safetensors")
    settings = {
        "format": _FORMAT,
        "step": step,
        "optimizer": optimizer_state.json_of(state.optimizer),
    }
    (partial / "state.json").write_text(json.dumps(settings, indent=1) + "\n")
    (partial / _CHECKSUMS).write_bytes(_checksums(files.hashes_below(partial)))


def _checksums(hashes: Mapping[str, str]) -> bytes:
    """The one way these checksums are written, so that any other byte is a change."""
    own = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": hashes, "self": own}, indent=1, sort_keys=True).encode() + b"\n"


def _load(path: Path, state: TrainingState) -> int:
    settings = json.loads((path / "state.json").read_text())
    if settings["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {settings['format']}, this version reads {_FORMAT}; "
            "resume with the version that wrote it"
        )
    state.load_model(path / "model")
    tensors = load_file(path / "optimizer.safetensors")
    # Cloned, because what safetensors returns may be a view of the file, which is pruned one day.
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer_state.restore(state.optimizer, owned, settings["optimizer"])
    _restore_in_place(path / "ema.safetensors", state.ema, "the present moving average")
    _restore_in_place(path / "extra.safetensors", state.extra, "what the algorithm carries now")
    return int(settings["step"])


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


@torch.no_grad()
def _restore_in_place(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    saved = load_file(path) if path.is_file() else {}
    unlike = saved.keys() ^ tensors.keys()
    unlike |= {n for n in saved.keys() & tensors.keys() if saved[n].shape != tensors[n].shape}
    if unlike:
        raise CheckpointError(
            f"{path} and {what} differ in {sorted(unlike)}; "
            "resume with the model and the settings that the run began with"
        )
    for name, tensor in saved.items():
        tensors[name].copy_(tensor)


def _discard(path: Path) -> None:
    """Out of sight in one rename, so that a half-removed checkpoint is never taken for one."""
    if path.exists():
        aside = path.with_name(f".discarded-{path.name}")
        _remove(aside)
        path.rename(aside)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError:
        return "the folder cannot be reached"


def _listed(folder: Path) -> str:
    return ", ".join(path.name for path in completed(folder).values()) or "there are none"
