"""WARP in a folder: algorithm 1 as it is written, and the same bits however it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_policy import run, small_warp, write_policy

from cabochon import folders
from cabochon.core.errors import ConfigError, DataError, RunChanged
from cabochon.evaluation.pareto import Point, hypervolume
from cabochon.pipelines.rewarded import refuse_other_starts
from cabochon.pipelines.stages import Event
from cabochon.pipelines.warp import Config
from cabochon.training.metrics import read_metrics
from cabochon.weights.interpolate import slerp, towards

MEMBERS = [f"iteration_{number}_member_{member}" for number in (1, 2) for member in (1, 2)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_policy(folder)
    return folder


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "warp"
    run(given, out)
    return out


def last(out: Path, name: str) -> Path:
    return next((out / name / "checkpoints").glob("step-*/model"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(folders.load_model(path).state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def outcome(out: Path) -> tuple[str, list[dict[str, str]], list[list[float]]]:
    """Everything that must be the same: results, weights, losses."""
    paths = [last(out, name) for name in MEMBERS]
    paths += [out / name for name in ("iteration_1_merged", "iteration_2_merged", "policy")]
    losses = [
        [line["loss"] for line in read_metrics(out / name / "metrics.jsonl")] for name in MEMBERS
    ]
    return (out / "results.json").read_text(), [folders.fingerprint(p) for p in paths], losses


def test_the_merges_and_starts_are_those_of_algorithm_1(given: Path, whole: Path) -> None:
    start = weights(given / "model")
    for number in (1, 2):
        members = [weights(last(whole, f"iteration_{number}_member_{m}")) for m in (1, 2)]
        assert not same(members[0], members[1])
        merged = weights(whole / f"iteration_{number}_merged")
        assert same(merged, slerp(start, members))
        if number == 1:
            start = towards(start, merged, 0.3)
            assert same(weights(whole / "iteration_2_start"), start)
    assert same(weights(whole / "policy"), merged)


def test_members_begin_alike_and_differ_in_their_prompts(given: Path, whole: Path) -> None:
    starts = [
        json.loads((whole / name / "manifest.json").read_text())["inputs"]["start"]
        for name in MEMBERS
    ]
    assert starts[0] == starts[1] == folders.fingerprint(given / "model")
    assert starts[2] == starts[3] == folders.fingerprint(whole / "iteration_2_start")
    first = [next(read_metrics(whole / name / "metrics.jsonl")) for name in MEMBERS[:2]]
    assert first[0]["loss"] != first[1]["loss"]


def test_the_fronts_go_from_the_start_to_each_merge(whole: Path) -> None:
    found = json.loads((whole / "results.json").read_text())["alignment"]
    fronts = [[Point(**point) for point in front["points"]] for front in found["fronts"]]
    assert [[point.label for point in front] for front in fronts] == [["0", "0.5", "1"]] * 2
    assert fronts[0][0] == fronts[1][0]
    assert abs(fronts[0][0].kl) < 1e-5
    kl = min(max(point.kl for point in front) for front in fronts)
    expected = [hypervolume(front, kl=kl, reward=front[0].reward) for front in fronts]
    assert found["hypervolumes"] == expected
    merged = next(each for each in found["policies"] if each["name"] == "iteration_2_merged")
    assert merged["reward"]["mean"] == pytest.approx(fronts[1][-1].reward)
    assert found["gain"]["after"] == merged["reward"]["mean"]
    page = (whole / "report.html").read_text("utf-8")
    assert "iteration 2 member 1" in page
    assert "Held-out prompts" in page


def test_every_rollout_is_recorded(whole: Path) -> None:
    pytest.importorskip("google_crc32c")
    from cabochon.rewards.records import replayed

    found = list(replayed(whole / MEMBERS[0] / "rollouts", 0))
    assert [each.number for each in found] == [0, 1, 2]
    assert all(each.scores.total.shape == (4, 2) for each in found)


def test_a_complete_pipeline_is_left_alone(given: Path, whole: Path) -> None:
    before, events = outcome(whole), []
    results = run(given, whole, events.append)
    assert outcome(whole) == before
    assert [event for event in events if event.step is not None] == []
    assert results == json.loads(before[0])


def test_killed_again_and_again_it_ends_with_the_same_bits(
    given: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "warp"
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from small_policy import run\n"
        "print('begin', flush=True)\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    for delay in (0.3, 0.8, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(given), str(out)],
            cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
    run(given, out)
    assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("stage", ["iteration_1_member_2", "iteration_2_merged", "evaluation"])
def test_interrupted_it_ends_with_the_same_bits(
    stage: str, given: Path, whole: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.step is not None and event.step.index == 1:
            signal.raise_signal(signal.SIGINT)
        if event.stage == stage and "member" not in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "warp", interrupt)
    run(given, tmp_path / "warp")
    assert outcome(tmp_path / "warp") == outcome(whole)


def test_a_member_that_began_elsewhere_is_not_merged(given: Path, whole: Path) -> None:
    members = [last(whole, name) for name in MEMBERS[1:3]]
    with pytest.raises(RunChanged, match="iteration_2_member_1 began from other weights"):
        refuse_other_starts(given / "model", members)


def test_a_start_that_was_changed_meanwhile_is_noticed(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "warp"

    def interrupt(event: Event) -> None:
        if event.stage == "iteration_2_member_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(given, out, interrupt)
    model, tokenizer = folders.load(out / "iteration_2_start")
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    for file in (out / "iteration_2_start").iterdir():
        file.unlink()
    (out / "iteration_2_start").rmdir()
    folders.save(model, tokenizer, out / "iteration_2_start")
    with pytest.raises(RunChanged, match="start"):
        run(given, out)


def test_one_member_is_merged_with_nobody(given: Path, tmp_path: Path) -> None:
    run(given, tmp_path / "warp", members=1, iterations=1, keep=0.5)
    member = weights(last(tmp_path / "warp", "iteration_1_member_1"))
    assert same(weights(tmp_path / "warp" / "iteration_1_merged"), member)
    expected = towards(weights(given / "model"), member, 0.5)
    assert same(weights(tmp_path / "warp" / "policy"), expected)


def test_members_in_bfloat16_are_merged_in_float32(given: Path, tmp_path: Path) -> None:
    run(given, tmp_path / "warp", precision="bf16", steps=2)
    for name in ("iteration_1_merged", "iteration_2_start", "policy"):
        assert {each.dtype for each in weights(tmp_path / "warp" / name).values()} == {
            torch.float32
        }
    member = weights(last(tmp_path / "warp", "iteration_1_member_1"))
    assert {each.dtype for each in member.values()} == {torch.bfloat16}


def test_too_few_prompts_are_named_with_what_to_do(given: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give more, or lower held_out"):
        run(given, tmp_path / "warp", held_out=39)


@pytest.mark.parametrize(
    "wrong",
    [{"members": 0}, {"iterations": 0}, {"eta": 1.5}, {"keep": -0.1}, {"etas": (0.0, 0.5)},
     {"held_out": 1}, {"threads": -1}, {"samples": 1}, {"steps": 0}],
)  # fmt: skip
def test_what_makes_no_experiment_is_refused(given: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        small_warp(given, **wrong)


def test_the_defaults_are_the_papers() -> None:
    config = Config(model="m", data="d")
    assert (config.kl_weight, config.anchor_rate, config.eta) == (0.1, 0.01, 0.3)
    assert (config.members, config.learning_rate, config.per) == (2, 1e-6, "block")
    assert config.method.anchor_config.kind == "ema"
