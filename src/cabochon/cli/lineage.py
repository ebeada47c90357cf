"""What the manifests of runs tell about which models a model folder was trained from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cabochon.core.errors import CabochonError
from cabochon.files import sha256_of
from cabochon.weight_files import read_json, weight_files

__all__ = ["strangers"]


def strangers(models: Sequence[Path], base: Path) -> list[str]:
    """Remarks on models whose runs tell where they began, and never name the weights of `base`.

    A run may go on from what another left, so its manifest leads to that one's, as far as these
    are where they were. Nothing is said of folders that lie in no run.

    Args:
        models: model folders, those of runs in their checkpoints.
        base: what they are all taken to have been trained from.
    """
    told = {model: list(_ancestors(model)) for model in models if _run_of(model) is not None}
    if not told:
        return []
    wanted = {path.name: sha256_of(path) for path in weight_files(base)}
    return [
        f"{_run_of(model)} did not begin from {base}: {_words(found)}; what is between the two is "
        "not what it has learned"
        for model, found in told.items()
        if _run_of(base) != _run_of(model) and all(weights != wanted for _, weights in found)
    ]


def _words(ancestors: Sequence[tuple[str, Any]]) -> str:
    named = [source or "a model without a name" for source, _ in ancestors]
    return f"it goes back to {', '.join(named)}" if named else "it made a new model"


def _ancestors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(Where the models lay, their weights' hashes), the nearest first."""
    seen = set()
    run = _run_of(folder)
    while run is not None and run not in seen:
        seen.add(run)
        inputs: Any = read_json(run / "manifest.json").get("inputs") or {}
        weights = (inputs.get("weights") or {}).get("model") or inputs.get("start")
        if not weights:
            return
        source = _source(run)
        yield source, weights
        run = _run_of_source(source)


def _source(run: Path) -> str:
    """What a run's settings name as the model that it begins with; empty where they do not."""
    model = yaml.safe_load((run / "config.yaml").read_text("utf-8")).get("model")
    return str(model.get("source", "")) if isinstance(model, dict) else str(model or "")


def _run_of_source(source: str) -> Path | None:
    from cabochon.cli.machine import model_folder

    try:
        return _run_of(model_folder(source)) if source else None
    except CabochonError:  # it is no longer there, or is no longer whole
        return None


def _run_of(folder: Path) -> Path | None:
    """RUN of RUN/checkpoints/step-N/model; None where the folder lies elsewhere."""
    place = folder.resolve().parents
    there = len(place) > 2 and (place[2] / "manifest.json").is_file()
    return place[2] if there and (place[2] / "config.yaml").is_file() else None
