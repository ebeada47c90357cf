"""The recipe: a fair comparison, and the same result however often it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe, write_lines, write_texts

from cabochon import folders
from cabochon.core.errors import ConfigError, DataError, RunChanged
from cabochon.data.readers import read_documents
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import gemma2
from cabochon.pipelines.recipe import Config, Phase
from cabochon.pipelines.stages import Event
from cabochon.training.metrics import read_metrics

TRAININGS = ("teacher", "scratch", "distilled", "tuned")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "family"
    gemma2.run(small_recipe(texts), folder)
    return folder


def weights(folder: Path) -> dict[str, dict[str, str]]:
    """The hashes of every model that a pipeline has made."""
    return {
        name: folders.fingerprint(next((folder / name / "checkpoints").glob("step-*/model")))
        for name in TRAININGS
    }


def outcome(folder: Path) -> tuple[str, dict[str, dict[str, str]], list[list[float]]]:
    """Everything that must be the same: results, weights, losses."""
    losses = [
        [line["loss"] for line in read_metrics(folder / name / "metrics.jsonl")]
        for name in TRAININGS
    ]
    return (folder / "results.json").read_text(), weights(folder), losses


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return list(read_metrics(folder / name / "metrics.jsonl"))


def test_both_students_begin_alike_and_read_the_same_batches(whole: Path) -> None:
    scratch, distilled = metrics(whole, "scratch"), metrics(whole, "distilled")
    # Before the first update both cost the same on the same tokens.
    assert scratch[0]["loss"] == pytest.approx(distilled[0]["nll"], rel=1e-6)
    assert [each["weight"] for each in scratch] == [each["weight"] for each in distilled]
    assert scratch[1]["loss"] != pytest.approx(distilled[1]["nll"], rel=1e-6)


def test_the_student_learns_from_the_finished_teacher(whole: Path) -> None:
    manifest = json.loads((whole / "distilled" / "manifest.json").read_text())
    assert manifest["inputs"]["teacher"] == weights(whole)["teacher"]
    assert json.loads((whole / "scratch" / "manifest.json").read_text())["inputs"]["teacher"] == {}


def test_every_stage_leaves_a_model_folder_that_loads(whole: Path) -> None:
    for name in TRAININGS:
        path = next((whole / name / "checkpoints").glob("step-*/model"))
        model, tokenizer = folders.load(path)
        assert isinstance(model, Gemma)
        assert tokenizer.vocab_size == 320


def test_the_results_hold_what_the_page_shows(whole: Path) -> None:
    found = json.loads((whole / "results.json").read_text())
    assert [each["model"] for each in found["held_out"]] == ["teacher", "scratch", "distilled"]
    by_name = {each["model"]: each["nats_per_token"] for each in found["held_out"]}
    difference = by_name["distilled"] - by_name["scratch"]
    assert found["comparison"]["difference"] == pytest.approx(difference)
    assert found["comparison"]["documents"] == 8
    assert len(found["answers"]) == 2
    assert (whole / "report.html").is_file()


def test_the_held_out_beginnings_are_equal_shares(whole: Path, texts: Path) -> None:
    found = json.loads((whole / "results.json").read_text())["corpus"]
    assert found["held_out_tokens"] == 400
    assert found["held_out_documents"] == len(list(read_documents(texts / "held_out.jsonl")))


def test_a_complete_pipeline_is_left_alone(whole: Path, texts: Path) -> None:
    before, events = outcome(whole), []
    results = gemma2.run(small_recipe(texts), whole, events.append)
    assert outcome(whole) == before
    assert [event for event in events if event.step is not None] == []
    assert results == json.loads(before[0])


@pytest.mark.parametrize(
    ("stage", "index"), [("teacher", 3), ("scratch", 5), ("distilled", 0), ("tuned", 2)]
)
def test_interrupted_in_a_training_it_ends_with_the_same_bits(
    stage: str, index: int, texts: Path, whole: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.step is not None and event.step.index == index:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gemma2.run(small_recipe(texts), tmp_path / "family", interrupt)
    assert not (tmp_path / "family" / "results.json").exists()
    events: list[Event] = []
    gemma2.run(small_recipe(texts), tmp_path / "family", events.append)
    assert outcome(tmp_path / "family") == outcome(whole)
    again = {event.step.index for event in events if event.stage == stage and event.step}
    assert min(again, default=99) > index


@pytest.mark.parametrize("stage", ["tokenizer", "data", "evaluation", "samples", "report"])
def test_interrupted_between_trainings_it_ends_with_the_same_bits(
    stage: str, texts: Path, whole: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gemma2.run(small_recipe(texts), tmp_path / "family", interrupt)
    gemma2.run(small_recipe(texts), tmp_path / "family")
    assert outcome(tmp_path / "family") == outcome(whole)


def test_killed_again_and_again_it_ends_with_the_same_bits(
    texts: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "family"
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from cabochon.pipelines import gemma2\n"
        "from small_recipe import small_recipe\n"
        "print('begin', flush=True)\n"
        "gemma2.run(small_recipe(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    here = Path(__file__).parent
    delays: Iterator[float] = iter((0.15, 0.4, 0.7, 1.0))
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(texts), str(folder)],
            cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
    gemma2.run(small_recipe(texts), folder)
    assert outcome(folder) == outcome(whole)


def test_another_recipe_does_not_go_on_in_the_same_folder(whole: Path, texts: Path) -> None:
    longer = small_recipe(texts, learn=Phase(steps=7, rows=2, learning_rate=1e-2))
    with pytest.raises(RunChanged, match=r"steps: 7"):
        gemma2.run(longer, whole)


def test_changed_text_is_noticed(texts: Path, tmp_path: Path) -> None:
    own = tmp_path / "texts"
    write_texts(own)
    recipe = small_recipe(own)

    def interrupt(event: Event) -> None:
        if event.stage == "teacher":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gemma2.run(recipe, tmp_path / "family", interrupt)
    write_lines(own / "train.jsonl", [{"text": "Something else entirely."}])
    with pytest.raises(RunChanged, match=r"train\.jsonl"):
        gemma2.run(recipe, tmp_path / "family")


def test_another_seed_makes_another_family(whole: Path, texts: Path, tmp_path: Path) -> None:
    gemma2.run(small_recipe(texts, seed=1), tmp_path / "family")
    assert all(weights(tmp_path / "family")[name] != weights(whole)[name] for name in TRAININGS)


def test_long_conversations_are_left_out_and_none_at_all_is_an_error(
    texts: Path, tmp_path: Path
) -> None:
    own = tmp_path / "texts"
    write_texts(own)
    rows = [json.loads(line) for line in (own / "chats.jsonl").read_text().splitlines()]
    write_lines(own / "chats.jsonl", [*rows, {"prompt": "word " * 500, "completion": "too long"}])
    recipe = small_recipe(own)
    results = gemma2.run(recipe, tmp_path / "family")
    assert results["corpus"]["conversations"] == len(rows)  # type: ignore[index]
    write_lines(own / "chats.jsonl", [{"prompt": "word " * 500, "completion": "too long"}] * 3)
    with pytest.raises(DataError, match=r"0 conversations fit into 64 tokens"):
        gemma2.run(recipe, tmp_path / "other")


def test_the_number_of_threads_is_the_recipes_inside_and_the_callers_afterwards(
    texts: Path, tmp_path: Path
) -> None:
    before, seen = torch.get_num_threads(), set()

    def look(event: Event) -> None:
        seen.add(torch.get_num_threads())
        if event.stage == "scratch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gemma2.run(small_recipe(texts, threads=before + 1), tmp_path / "family", look)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before


def test_in_bfloat16_an_interrupted_pipeline_ends_with_the_same_bits_too(
    texts: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "distilled" and event.step is not None and event.step.index == 2:
            raise KeyboardInterrupt

    recipe = small_recipe(texts, precision="bf16")
    gemma2.run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        gemma2.run(recipe, tmp_path / "family", interrupt)
    gemma2.run(recipe, tmp_path / "family")
    assert outcome(tmp_path / "family") == outcome(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_recipe_comes_to_its_end(texts: Path, tmp_path: Path) -> None:
    results = gemma2.run(small_recipe(texts, device="cuda"), tmp_path / "family")
    assert results["format"] == 1


def test_a_text_that_is_not_there_is_named(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        gemma2.run(small_recipe(texts, held_out=str(texts / "nowhere.jsonl")), tmp_path / "family")
    assert not (tmp_path / "family").exists()


def test_what_makes_no_recipe_is_refused(texts: Path) -> None:
    recipe: Config = small_recipe(texts)
    for wrong in ({"context": 0}, {"held_out_chat_count": 1}, {"samples": 0}, {"threads": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(recipe, **wrong)
    with pytest.raises(ConfigError, match="steps"):
        Phase(steps=0, rows=1, learning_rate=1e-3)
