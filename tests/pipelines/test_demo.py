"""The demo: the recipe on the standard library, sized by arithmetic alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cabochon.core.errors import ConfigError, RunChanged
from cabochon.data.corpus import module_of
from cabochon.pipelines import demo
from cabochon.pipelines.stages import Event

SHORT = demo.Config(minutes=0.01, threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo far too short to learn much."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo.run(SHORT, folder)
    return folder


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_minutes_scale_the_updates_and_nothing_else(tmp_path: Path) -> None:
    full = demo.recipe(demo.Config(), tmp_path)
    double = demo.recipe(demo.Config(minutes=2 * demo.FULL_MINUTES), tmp_path)
    once, twice = (demo.alignment(demo.Config(minutes=m * demo.FULL_MINUTES)) for m in (1, 2))
    for name in ("write", "bond", "member"):
        assert getattr(twice, name).steps == 2 * getattr(once, name).steps
    for name in ("teach", "learn", "tune"):
        once, twice = getattr(full, name), getattr(double, name)
        assert twice.steps == 2 * once.steps
        assert (twice.rows, twice.learning_rate) == (once.rows, once.learning_rate)
    assert (double.teacher, double.student) == (full.teacher, full.student)


def test_the_teacher_is_larger_and_reads_more(tmp_path: Path) -> None:
    recipe = demo.recipe(demo.Config(), tmp_path)
    assert recipe.teacher.width > recipe.student.width
    assert recipe.teach.steps * recipe.teach.rows > 2 * recipe.learn.steps * recipe.learn.rows


def test_no_module_is_on_both_sides(finished: Path) -> None:
    corpus = finished / "corpus"
    train = {module_of(each["source"]).lstrip("_") for each in lines(corpus / "train.jsonl")}
    held_out = {module_of(each["source"]).lstrip("_") for each in lines(corpus / "held_out.jsonl")}
    asked = {module_of(each["source"]).lstrip("_") for each in lines(corpus / "chats.jsonl")}
    judged = {
        module_of(each["source"]).lstrip("_") for each in lines(corpus / "held_out_chats.jsonl")
    }
    assert len(held_out) > 20
    assert train.isdisjoint(held_out)
    assert asked.isdisjoint(held_out)
    assert judged.isdisjoint(train)


def test_nobody_is_judged_on_a_signature_that_stands_in_a_module_that_was_read(
    finished: Path,
) -> None:
    results = json.loads((finished / "results.json").read_text())
    asked = {sample["prompt"] for sample in results["alignment"]["samples"]}
    known = {each["prompt"] for each in lines(finished / "corpus" / "functions.jsonl")}
    assert len(asked) == 8
    assert known.isdisjoint(asked)
    page = (finished / "report.html").read_text("utf-8")
    assert "Learning from a reward" in page
    assert all(name in page for name in ("member 1", "merged", "writer"))


def test_the_answer_is_not_in_the_question(finished: Path) -> None:
    rows = lines(finished / "corpus" / "held_out_chats.jsonl")
    assert len(rows) > 200
    assert not [each for each in rows if each["completion"] in each["prompt"]]


def test_a_demo_too_short_to_tell_says_what_it_found_and_no_more(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    page = (finished / "report.html").read_text("utf-8")
    low, high = results["comparison"]["interval"]
    if low <= 0.0 <= high:
        assert "does not show a difference" in page
    else:
        assert ("is better than" if high < 0.0 else "is worse than") in page
    assert results["repeat"] in page
    assert results["repeat"] == "cabochon demo --seed 0 --minutes 0.01 --threads 1"


def test_the_folder_says_what_to_resume_and_goes_on_only_with_that(finished: Path) -> None:
    content = yaml.safe_load((finished / "config.yaml").read_text())
    assert content == {"pipeline": "demo", "seed": 0, "minutes": 0.01, "threads": 1}
    events: list[Event] = []
    demo.run(SHORT, finished, events.append)
    assert [event for event in events if event.step is not None] == []
    with pytest.raises(RunChanged, match="seed: 1"):
        demo.run(demo.Config(minutes=0.01, threads=1, seed=1), finished)


@pytest.mark.parametrize("wrong", [{"minutes": 0.0}, {"minutes": float("nan")}, {"threads": 0}])
def test_a_length_or_a_number_of_threads_that_makes_no_sense_is_refused(
    wrong: dict[str, float],
) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        demo.Config(**wrong)  # type: ignore[arg-type]
