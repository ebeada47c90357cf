"""The page of teacher hacking claims no more than its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import begin_run, read

from cabochon.evaluation import hacking_page, report


def distance(mean: float) -> dict[str, Any]:
    return {"mean": mean, "interval": [mean - 0.1, mean + 0.1]}


def regime(name: str, golden: list[float], kind: str, turned: int | None) -> dict[str, Any]:
    steps = [10, 20, 40, 80]
    lowest = steps[golden.index(min(golden))]
    every = {
        form: distance(0.5) for form in ("forward_kl", "reverse_kl", "sequence_js", "token_js")
    }
    return {
        "name": name,
        "responses": 640,
        "points": [
            {"step": s, "proxy": distance(2.0 - 0.01 * s), "golden": distance(g)}
            for s, g in zip(steps, golden, strict=True)
        ],
        "judgement": {
            "lowest": lowest, "interior": lowest not in (10, 80), "kind": kind,
            "golden": {"mean": golden[-1] - min(golden), "interval": [0.2, 0.4]},
            "proxy": {"mean": -0.4, "interval": [-0.5, -0.3]},
        },
        "detector": {
            "law": {"intercept": 1.0, "slope": 0.2, "spread": 0.01, "first": 10, "last": 40},
            "left": None, "turned": turned,
            "reasons": [f"at update {turned} the distance to the teacher is rising"] * bool(turned),
        },
        "final": {"teacher": every, "oracle": every},
    }  # fmt: skip


def results(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "pipeline": "teacher_hacking", "title": "Teacher hacking on some text",
        "text": "some text", "repeat": "cabochon run teacher_hacking --out FOLDER", "seed": 3,
        "threads": 1, "divergence": "forward_kl", "steps": 80, "rows": 8,
        "prompts": {
            "oracle": 100, "distillation": 20, "responses": 4, "held_out": 30,
            "held_out_responses": 1, "prompt_tokens": 6, "response_tokens": 5, "cut": 7,
        },
        "models": [
            {"name": name, "parameters": 1000, "weights": {}}
            for name in ("oracle", "teacher", "student", "offline", "online_student")
        ],
        "start": {"proxy": distance(4.0), "golden": distance(6.0)},
        "teacher": {"golden": distance(2.0)},
        "regimes": [
            regime("offline", [3.5, 3.0, 3.1, 3.3], "hacking", 80),
            regime("online_student", [3.5, 3.0, 2.8, 2.5], "none", None),
        ],
        "compared": [
            {"regime": "online_student", "difference": {"mean": -0.8, "interval": [-0.9, -0.7]}}
        ],
        **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("oracle", "teacher", "offline", "online_student"):
        begin_run(tmp_path / name, 20)
    (tmp_path / "results.json").write_text(json.dumps(results()))
    return tmp_path


def test_the_page_is_whole_and_shows_every_figure(folder: Path):
    page = read(report.render(folder))
    for text in (
        "Teacher hacking: offline",
        "Golden is lowest at update 20 and has risen by +0.300 (95% interval +0.200 to +0.400)",
        "the proxy changed by -0.400",
        "At update 80 the distance to the teacher is rising.",
        "The proxy follows its law to the end.",
        "online student (-0.800 (95% interval -0.900 to -0.700))",
        "The same again",
        "2.000",
    ):
        assert text in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags.count("svg") >= 3


def test_an_unfinished_one_has_its_trainings(folder: Path):
    (folder / "results.json").unlink()
    assert "has not come to its end" in read(report.render(folder)).text


def test_the_headline_says_what_was_found():
    def headline(*kinds: str) -> str:
        names = ("offline", "diverse")
        regimes = [
            regime(n, [3.0, 2.0, 2.1, 2.5], k, None) for n, k in zip(names, kinds, strict=True)
        ]
        found: str = hacking_page.findings(results(regimes=regimes))["headline"]
        return found

    assert headline("hacking", "overfitting") == "Teacher hacking: offline"
    assert headline("overfitting", "none") == "Overfitting, no teacher hacking: offline"
    assert headline("none", "none").startswith("No regime")


def test_a_difference_that_is_not_sure_is_not_told():
    unsure = [{"regime": "diverse", "difference": {"mean": -0.1, "interval": [-0.3, 0.1]}}]
    assert "No regime ends nearer" in hacking_page.findings(results(compared=unsure))["verdict"]
    assert "nothing to compare" in hacking_page.findings(results(compared=[]))["verdict"]


def test_the_picture_is_drawn(folder: Path, tmp_path: Path):
    report.picture(folder, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
