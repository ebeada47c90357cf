"""An optimizer's state as named tensors and JSON, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cabochon.core.errors import CheckpointError
from cabochon.training.precision import masters, publish

__all__ = ["json_of", "restore", "tensors_of"]

_MASTER = "master"


def tensors_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state as "name/key", and the float32 masters as "name/master"."""
    tensors = {}
    for name, parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().contiguous()
    names = [name for name, _ in _parameters(optimizer)]
    for place, master in masters(optimizer):
        tensors[f"{names[place]}/{_MASTER}"] = master.detach().contiguous()
    return tensors


def json_of(optimizer: Optimizer) -> dict[str, Any]:
    """What is left: the settings of each group, and the plain numbers of the state."""
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in _parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        if numbers:
            plain[name] = numbers
    return {"groups": [_settings(group) for group in optimizer.param_groups], "numbers": plain}


@torch.no_grad()
def restore(optimizer: Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Puts state, settings and masters back and publishes the masters into their model.

    Raises:
        CheckpointError: the state belongs to other parameters than the optimizer holds.
    """
    parameters = dict(_parameters(optimizer))
    by_name: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    strangers = sorted(by_name.keys() - parameters.keys())
    if strangers or len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the optimizer state holds {len(saved['groups'])} groups and state for {strangers}; "
            f"the present optimizer has {len(optimizer.param_groups)} groups and lacks those "
            "parameters; resume with the model and optimizer that the run began with"
        )
    found = dict(masters(optimizer))
    state: dict[int, dict[str, Any]] = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        entries = {**saved["numbers"].get(name, {}), **by_name.get(name, {})}
        _restore_master(name, parameter, entries, is_master=place in found)
        if entries:
            state[place] = entries
    groups = []
    begin = 0
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        end = begin + len(group["params"])
        like = {
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in settings.items()
        }
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        groups.append({**like, **names, "params": list(range(begin, end))})
        begin = end
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _restore_master(
    name: str, parameter: nn.Parameter, entries: dict[str, Any], *, is_master: bool
) -> None:
    saved = entries.pop(_MASTER, None)
    if (saved is not None) != is_master or (is_master and saved.shape != parameter.shape):
        raise CheckpointError(
            f"{name} is {'a' if is_master else 'no'} float32 master of {tuple(parameter.shape)} in "
            f"the present optimizer, but the checkpoint holds "
            f"{'none' if saved is None else f'one of {tuple(saved.shape)}'}; "
            "resume in the precision that the run began with"
        )
    if is_master:
        parameter.copy_(saved)
        publish([parameter])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _parameters(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its name, or its place where the optimizer was given no names."""
    place = 0
    for group in optimizer.param_groups:
        names = group.get("param_names")
        for i, parameter in enumerate(group["params"]):
            yield (names[i] if names else str(place)), parameter
            place += 1
