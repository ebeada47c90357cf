"""The experiment: a fair comparison, and the same result however often it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_experiment import small_experiment, write_prompts
from small_recipe import write_lines

from cabochon import folders
from cabochon.core.errors import ConfigError, DataError, RunChanged, TokenizerMismatch
from cabochon.evaluation import report
from cabochon.pipelines import teacher_hacking
from cabochon.pipelines.hacking_recipe import Learning
from cabochon.pipelines.regimes import REGIMES
from cabochon.pipelines.stages import Event
from cabochon.training.metrics import read_metrics

MODELS = ("oracle", "teacher", "student", *REGIMES)
LEFT_ALONE = Learning(steps=0, rows=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_prompts(path)
    return path


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "hacking"
    teacher_hacking.run(small_experiment(texts), folder)
    return folder


def model_folder(folder: Path, name: str) -> Path:
    return next((folder / name / "checkpoints").glob("step-*/model"))


def outcome(folder: Path) -> tuple[str, list[list[dict[str, float]]]]:
    """Everything that must be the same: results (with all weights' hashes), and every update."""
    updates = [
        [
            {key: value for key, value in line.items() if not key.endswith(("seconds", "second"))}
            for line in read_metrics(folder / name / "metrics.jsonl")
        ]
        for name in MODELS
    ]
    return (folder / "results.json").read_text(), updates


def first_update(folder: Path, name: str) -> dict[str, float]:
    return next(iter(read_metrics(folder / name / "metrics.jsonl")))


def test_every_regime_begins_with_the_same_weights_and_makes_equally_many_updates(whole: Path):
    begins = {
        json.dumps(json.loads((whole / name / "manifest.json").read_text())["inputs"]["student"])
        for name in REGIMES
    }
    assert begins == {json.dumps(folders.fingerprint(model_folder(whole, "student")))}
    counts = {len(list(read_metrics(whole / name / "metrics.jsonl"))) for name in REGIMES}
    assert counts == {6}


def test_offline_is_a_part_of_diverse_and_the_online_prompts_are_the_same(whole: Path):
    results = json.loads((whole / "results.json").read_text())
    drawn = {each["name"]: each["responses"] for each in results["regimes"]}
    assert drawn == {
        "offline": 6, "diverse": 12, "more_prompts": 12, "online_teacher": 18, "online_student": 18,
    }  # fmt: skip


def test_the_student_writes_only_where_it_is_asked_to(whole: Path):
    own = {name: first_update(whole, name)["on_policy"] for name in REGIMES}
    assert own == {name: float(name == "online_student") for name in REGIMES}


def test_no_held_out_prompt_was_learned(whole: Path, texts: Path):
    from cabochon.core import Key
    from cabochon.data.readers import read_documents
    from cabochon.data.tokenizer import Tokenizer
    from cabochon.pipelines.responses import split

    found = split(
        [each.text for each in read_documents(texts)] * 2,
        Tokenizer.load(whole / "tokenizer"),
        longest=6,
        sizes=(20, 12, 5),
        key=Key(0),
        origin="the texts",
    )
    sides = [set(found.oracle), set(found.distillation), set(found.held_out)]
    assert [len(each) for each in sides] == [20, 12, 5]
    assert len(set.union(*sides)) == 37


def test_the_results_hold_the_curves_and_the_page_shows_them(whole: Path):
    results = json.loads((whole / "results.json").read_text())
    for regime in results["regimes"]:
        assert [point["step"] for point in regime["points"]] == [1, 2, 3, 6]
        measured = {
            line["step"] + 1: (line["proxy"], line["golden"])
            for line in read_metrics(whole / regime["name"] / "metrics.jsonl")
            if "proxy" in line
        }
        for point in regime["points"]:
            told = (point["proxy"]["mean"], point["golden"]["mean"])
            assert told == pytest.approx(measured[point["step"]])
            low, high = point["golden"]["interval"]
            assert low <= point["golden"]["mean"] <= high
        assert regime["final"]["teacher"]["forward_kl"]["mean"] == pytest.approx(told[0])
        assert regime["final"]["oracle"]["sequence_js"]["mean"] < 0.6932
    page = (whole / "report.html").read_text()
    assert "online student" in page
    assert "distance to the oracle" in page


def test_a_page_can_be_made_while_it_runs_and_a_picture_afterwards(whole: Path, tmp_path: Path):
    report.picture(whole, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_complete_experiment_is_left_alone(whole: Path, texts: Path):
    before, events = outcome(whole), []
    results = teacher_hacking.run(small_experiment(texts), whole, events.append)
    assert outcome(whole) == before
    assert [event for event in events if event.step is not None] == []
    assert results["regimes"] == json.loads(before[0])["regimes"]


@pytest.mark.parametrize(
    ("stage", "index"),
    [("teacher", 1), ("online_teacher", 2), ("online_student", 4)],
)
def test_interrupted_in_a_training_it_ends_with_the_same_bits(
    stage: str, index: int, texts: Path, whole: Path, tmp_path: Path
):
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.step is not None and event.step.index == index:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        teacher_hacking.run(small_experiment(texts), tmp_path / "hacking", interrupt)
    assert not (tmp_path / "hacking" / "results.json").exists()
    teacher_hacking.run(small_experiment(texts), tmp_path / "hacking")
    assert outcome(tmp_path / "hacking") == outcome(whole)


@pytest.mark.parametrize("stage", ["responses/few", "evaluation"])
def test_interrupted_between_trainings_it_ends_with_the_same_bits(
    stage: str, texts: Path, whole: Path, tmp_path: Path
):
    def interrupt(event: Event) -> None:
        if event.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_hacking.run(small_experiment(texts), tmp_path / "hacking", interrupt)
    teacher_hacking.run(small_experiment(texts), tmp_path / "hacking")
    assert outcome(tmp_path / "hacking") == outcome(whole)


def test_killed_again_and_again_it_ends_with_the_same_bits(
    texts: Path, whole: Path, tmp_path: Path
):
    folder = tmp_path / "hacking"
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from cabochon.pipelines import teacher_hacking\n"
        "from small_experiment import small_experiment\n"
        "print('begin', flush=True)\n"
        "teacher_hacking.run(small_experiment(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    for delay in (0.5, 1.0, 1.5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(texts), str(folder)],
            cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
    teacher_hacking.run(small_experiment(texts), folder)
    assert outcome(folder) == outcome(whole)


def test_with_the_oracle_for_a_teacher_proxy_and_golden_are_one_curve(
    whole: Path, texts: Path, tmp_path: Path
):
    oracle = str(model_folder(whole, "oracle"))
    results = teacher_hacking.run(
        small_experiment(
            texts, oracle=oracle, teacher=oracle, teach=LEFT_ALONE, regimes=("offline",)
        ),
        tmp_path / "hacking",
    )
    (regime,) = json.loads(json.dumps(results["regimes"]))
    for point in regime["points"]:
        assert point["proxy"] == point["golden"]
    assert results["teacher"]["golden"]["mean"] == 0.0
    assert results["compared"] == []


def test_models_that_were_given_are_used_as_they_are_or_tuned_further(
    whole: Path, texts: Path, tmp_path: Path
):
    given = {name: str(model_folder(whole, name)) for name in ("oracle", "teacher", "student")}
    config = small_experiment(
        texts, **given, teach=LEFT_ALONE, begin=LEFT_ALONE, regimes=("offline", "online_student")
    )
    results = teacher_hacking.run(config, tmp_path / "hacking")
    weights = {each["name"]: each["weights"] for each in results["models"]}
    for name, path in given.items():
        assert weights[name] == folders.fingerprint(path)
    assert not (tmp_path / "hacking" / "teacher").exists()
    further = small_experiment(texts, **given, regimes=("offline",))
    results = teacher_hacking.run(further, tmp_path / "further")
    weights = {each["name"]: each["weights"] for each in results["models"]}
    assert weights["teacher"] != folders.fingerprint(given["teacher"])


def test_models_without_a_common_tokenizer_are_refused(whole: Path, texts: Path, tmp_path: Path):
    other = tmp_path / "other"
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink", "gold"]
    lines = [{"text": f"{a} {b} then {c}"} for a in words for b in words for c in words[:3]]
    write_lines(tmp_path / "texts.jsonl", lines)
    config = small_experiment(tmp_path / "texts.jsonl", regimes=("offline",), vocab_size=300)
    teacher_hacking.run(config, other)
    with pytest.raises(TokenizerMismatch, match="do not share a tokenizer: 320 entries"):
        teacher_hacking.run(
            small_experiment(
                texts,
                oracle=str(model_folder(whole, "oracle")),
                student=str(model_folder(other, "student")),
            ),
            tmp_path / "hacking",
        )


def test_another_experiment_does_not_go_on_in_the_same_folder(whole: Path, texts: Path):
    with pytest.raises(RunChanged, match="held_out: 4"):
        teacher_hacking.run(small_experiment(texts, held_out=4), whole)


def test_too_few_prompts_are_an_error_that_counts_them(texts: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"different prompts .* and 1017 are needed"):
        teacher_hacking.run(small_experiment(texts, oracle_prompts=1000), tmp_path / "hacking")


def test_a_damaged_file_of_responses_is_named(whole: Path, texts: Path, tmp_path: Path):
    folder = tmp_path / "hacking"

    def interrupt(event: Event) -> None:
        if event.stage == "offline":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_hacking.run(small_experiment(texts), folder, interrupt)
    path = folder / "responses" / "few" / "00000000.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match=r"few/00000000\.jsonl is damaged"):
        teacher_hacking.run(small_experiment(texts), folder)


def test_what_makes_no_experiment_is_refused(texts: Path):
    config = small_experiment(texts)
    for wrong, name in (
        ({"prompts": 0}, "prompts"),
        ({"held_out": 1}, "held_out"),
        ({"points": 1}, "points"),
        ({"threads": -1}, "threads"),
        ({"regimes": ()}, "regimes"),
        ({"regimes": ("offline", "offline")}, "regimes"),
        ({"regimes": ("nowhere",)}, "nowhere"),
        ({"divergence": "nothing"}, "nothing"),
        ({"divergence": "jsd"}, "beta"),
        ({"teach": LEFT_ALONE}, "teach.steps is 0"),
        ({"points": 7}, "distil.steps"),
    ):
        with pytest.raises(ConfigError, match=name):
            replace(config, **wrong)
    with pytest.raises(ConfigError, match="learning_rate"):
        Learning(steps=1, rows=1, learning_rate=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_experiment_comes_to_its_end(texts: Path, tmp_path: Path):
    results = teacher_hacking.run(small_experiment(texts, device="cuda"), tmp_path / "hacking")
    assert results["format"] == 1
