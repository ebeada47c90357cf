"""A distillation that is watched: measured, warned of, resumed, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workshop import Done, Workshop, call, write_jsonl

from cabochon.cli.proxy import ProxySettings
from cabochon.core.errors import ConfigError
from cabochon.training.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("proxy")
    tuned = ("--model", workshop.run, "--learning-rate", "1e-2", "--steps", 20)
    done = workshop.train(*tuned, "--out", place / "teacher", algorithm="sft")
    assert done.code == 0, done.err
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"{a}+1"} for a in range(6)])
    write_jsonl(place / "held_out.jsonl", [{"prompt": f"{a}+2"} for a in range(6)])
    return place


def train(folder: Path, workshop: Workshop, out: str, **more: object) -> Done:
    given = {
        "student": workshop.run, "teacher": folder / "teacher", "data": folder / "prompts.jsonl",
        "out": folder / out, "steps": 12, "context": 48, "max-new-tokens": 6, "batch-size": 2,
        "threads": 1, "device": "cpu", "checkpoint-every": 5, "sample-every": 0,
        "proxy-every": 3, "proxy-data": folder / "held_out.jsonl", **more,
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return call("train", "gkd", *words)


def measured(run: Path) -> dict[int, float]:
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"] + 1: line["proxy"] for line in lines if "proxy" in line}


def test_the_proxy_is_measured_every_k_updates_and_changes_no_weight(
    folder: Path, workshop: Workshop
):
    done = train(folder, workshop, "watched")
    assert done.code == 0, done.err
    found = measured(folder / "watched")
    assert list(found) == [3, 6, 9, 12]
    assert all(value > 0.0 for value in found.values())
    assert train(folder, workshop, "blind", **{"proxy-every": 4}).code == 0
    seen, blind = (
        [line["loss"] for line in read_metrics(folder / name / "metrics.jsonl")]
        for name in ("watched", "blind")
    )
    assert seen == blind
    assert measured(folder / "blind")[12] == found[12]


def test_a_resumed_run_measures_the_same(folder: Path, workshop: Workshop):
    whole = train(folder, workshop, "whole")
    assert whole.code == 0, whole.err
    before = measured(folder / "whole")
    done = call("resume", folder / "whole", "--step", 10)
    assert done.code == 0, done.err
    assert measured(folder / "whole") == before


def test_what_cannot_be_watched_is_refused_before_anything_is_trained(
    folder: Path, workshop: Workshop
):
    for more, reason in (
        ({"proxy-data": folder / "prompts.jsonl"}, "is among the data too"),
        ({"teacher": "http://127.0.0.1:9"}, "--proxy-every needs a --teacher folder"),
    ):
        done = train(folder, workshop, "refused", **more)
        assert done.code != 0
        assert reason in done.err
        assert not (folder / "refused").exists()
    write_jsonl(folder / "single.jsonl", [{"prompt": "9+9"}])
    done = train(folder, workshop, "refused", **{"proxy-data": folder / "single.jsonl"})
    assert "1 held-out prompts, need 2" in done.err


def test_half_a_setting_is_refused():
    for wrong in (
        {"proxy_every": 5},
        {"proxy_data": ("x.jsonl",)},
        {"proxy_every": -1},
        {"proxy_prompts": 1},
    ):
        with pytest.raises(ConfigError, match="proxy"):
            ProxySettings(**wrong)
    assert json.dumps(ProxySettings().proxy_data) == "[]"
