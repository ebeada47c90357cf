"""Numbers that no training can have are refused in a sentence, before there is a run directory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from workshop import call

from cabochon.cli.configuration import build
from cabochon.cli.recipe import AGENTS, ALGORITHMS
from cabochon.core.errors import ConfigError

NAN, INF = float("nan"), float("inf")
EVERYWHERE = {
    "max_grad_norm": (-1.0, NAN),
    "learning_rate": (-1.0, 0.0, NAN, INF),
    "weight_decay": (-1.0, NAN, INF),
    "eps": (0.0, NAN),
    "steps": (0, -1),
    "warmup": (-1,),
    "floor": (-1.0, 2.0, NAN),
    "checkpoint_every": (0,),
    "keep": (0,),
}
OF_MODELS_OF_TEXTS = {"accumulate": (0, -2), "batch_size": (0,), "ema": (1.0, NAN), "context": (1,)}


def settings_of(algorithm: str) -> Any:
    return importlib.import_module((ALGORITHMS | AGENTS)[algorithm]).RECIPE.settings


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *AGENTS])
def test_each_is_refused_by_its_name(algorithm: str) -> None:
    build(settings_of(algorithm), {}, origin="nothing")
    wrong = EVERYWHERE | (OF_MODELS_OF_TEXTS if algorithm in ALGORITHMS else {})
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ConfigError, match=name):
                build(settings_of(algorithm), {name: value}, origin="settings")


def test_layers_have_a_width() -> None:
    with pytest.raises(ConfigError, match="own_layers"):
        build(settings_of("vtrace_agent"), {"own_layers": [64, -1]}, origin="settings")


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *AGENTS])
def test_there_is_no_run_directory_then(algorithm: str, tmp_path: Path) -> None:
    done = call("train", algorithm, "--max-grad-norm", "nan", "--out", tmp_path / "run")
    assert done.code == 2
    assert "max_grad_norm" in done.err
    assert not (tmp_path / "run").exists()
