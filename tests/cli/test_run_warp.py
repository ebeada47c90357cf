"""`cabochon run warp`, as a person types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from cabochon import folders
from cabochon.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from small_policy import write_policy

SMALL = [
    "--plain", "--members", "2", "--steps", "2", "--batch-size", "2", "--samples", "2",
    "--max-new-tokens", "6", "--learning-rate", "1e-2", "--held-out", "4", "--judged-samples", "1",
    "--etas", "0", "1", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_policy(folder)
    return folder


def words(given: Path, *more: str) -> list[str]:
    data = str(given / "prompts.jsonl")
    return ["run", "warp", "--model", str(given / "model"), "--data", data, *SMALL, *more]


def test_it_leaves_a_policy_a_report_and_results_and_goes_on_when_resumed(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "warp"
    rewards = ["--reward", "matches:e", "length:4", "--reward-weights", "1", "0.5"]
    assert main(words(given, *rewards, "--json", "--out", str(out))) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["alignment"]["policies"][0]["parts"]
    assert list(parts) == ["matches:e", "length:4"]
    assert {"policy", "report.html", "iteration_1_merged"} <= {each.name for each in out.iterdir()}
    again = [
        "train", "rlhf", "--model", str(given / "model"), "--plain", "--replay",
        str(out / "iteration_1_member_1"), "--steps", "2", "--batch-size", "2", "--samples", "2",
        "--max-new-tokens", "6", "--threads", "1", "--out", str(tmp_path / "again"),
    ]  # fmt: skip
    assert main(again) == 0
    capsys.readouterr()
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["reward"] == ["matches:e", "length:4"]
    (out / "results.json").unlink()
    assert main(["resume", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_reward_of_weight_0_is_reported_and_not_learned_from(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = ["--reward", "matches:e", "length:4", "--reward-weights", "1", "0"]
    found, policies = [], []
    for name, rewards in (("with", gold), ("without", ["--reward", "matches:e"])):
        out = tmp_path / name
        assert main(words(given, *rewards, "--json", "--out", str(out))) == 0
        found.append(json.loads(capsys.readouterr().out)["alignment"]["policies"])
        policies.append(folders.fingerprint(out / "policy"))
    assert policies[0] == policies[1]
    assert [each["reward"] for each in found[0]] == [each["reward"] for each in found[1]]
    assert {"matches:e", "length:4"} == set(found[0][0]["parts"])


def test_other_rewards_do_not_go_on_in_the_same_folder(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "warp")
    assert main(words(given, "--reward", "matches:e", "--out", out)) == 0
    assert main(words(given, "--reward", "matches:o", "--out", out)) != 0
    assert "matches:o" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "what is good"),
        (["--reward", "pases"], "parses"),
        (["--reward", "matches:e", "--reward-normalise", "10"], "evaluate rewards --save"),
        (["--reward", "matches:e", "--eta", "2"], "eta must lie"),
        (["--reward", "matches:e", "--keep", "nan"], "keep must lie"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    given: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(given, *more, "--out", str(tmp_path / "warp"))) != 0
    assert says in capsys.readouterr().err


def test_a_reward_that_is_no_number_stops_with_its_sample(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_reward.py").write_text("def nan(prompt, completion): return float('nan')\n")
    monkeypatch.chdir(tmp_path)
    assert main(words(given, "--reward", "python:own_reward.nan", "--out", "warp")) != 0
    said = capsys.readouterr().err
    assert "prompt 0" in said
    assert "nan" in said
