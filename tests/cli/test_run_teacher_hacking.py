"""`run teacher_hacking` before it begins: what is listed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from workshop import call, write_jsonl


def test_it_is_listed_among_the_pipelines():
    done = call("run", "--help")
    assert done.code == 0
    assert "teacher_hacking" in done.out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--oracle", "nowhere"), "nowhere"),
        (("--teach.steps", 0), "a new teacher would have learned nothing"),
        (("--distil.steps", 5), "distil.steps must be at least points"),
        (("--divergence", "jsd"), "beta"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(
    flags: tuple[object, ...], reason: str, tmp_path: Path
):
    done = call("run", "teacher_hacking", "--out", tmp_path / "out", *flags)
    assert done.code != 0
    assert reason in done.err
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_are_counted(tmp_path: Path):
    texts = [
        {"text": f"Some text that is long enough to learn from, number {n}."} for n in range(90)
    ]
    write_jsonl(tmp_path / "texts.jsonl", texts)
    done = call(
        "run", "teacher_hacking", "--out", tmp_path / "out", "--data", tmp_path / "texts.jsonl",
        "--vocab-size", 300,
    )  # fmt: skip
    assert done.code == 1
    assert "different prompts" in done.err
