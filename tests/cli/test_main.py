"""The binary's front door: fast, honest about what there is, clear when asked wrongly."""

from __future__ import annotations

import importlib
import subprocess
import sys

import options
import pytest
import torch

from cabochon import cli
from cabochon.cli import VERBS, main
from cabochon.core.errors import DataError


def test_help_lists_every_verb_and_every_verb_answers_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    listing = capsys.readouterr().out
    for verb, (module, purpose) in VERBS.items():
        assert verb in listing
        assert purpose in listing
        assert callable(importlib.import_module(module).main)
        assert main([verb, "--help"]) == 0
        assert f"usage: cabochon {verb}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    """Which is what keeps it under half a second."""
    code = (
        "import sys; from cabochon.cli import main; main(['--help']);"
        "heavy = {'torch', 'pydantic', 'tyro', 'rich', 'yaml', 'numpy', 'transformers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_verb_at_all_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: cabochon VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "train"),
        (["train", "pretrian"], "pretrain"),
        (["data", "pac"], "pack"),
        (["evaluate", "perplexty"], "perplexity"),
        (["run", "gema2"], "gemma2"),
    ],
)
def test_an_unknown_word_names_the_nearest(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert f"did you mean {meant!r}?" in captured.err
    assert captured.out == ""


def test_a_known_error_is_one_message_and_a_traceback_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_words: list[str]) -> int:
        raise DataError("the corpus is empty")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "cabochon: the corpus is empty\n"
    with pytest.raises(DataError):
        main(["--debug", "train"])
    monkeypatch.setenv("CABOCHON_DEBUG", "1")
    with pytest.raises(DataError):
        main(["train"])


@pytest.mark.parametrize(
    ("words", "passed_on"),
    [
        ("--debug train sft", "train sft"),
        ("train sft --debug", "train sft"),
        ("train sft --debug --seed 1", "train sft --seed 1"),
        ("generate M --prompt a --debug b", None),
        ("generate --debug M", None),
        ("generate M -- --debug", None),
        ("-- --debug", None),
        ("--prompt=--debug", None),
        ("", None),
    ],
)
def test_debug_is_taken_out_only_where_it_stands_for_itself(
    words: str, passed_on: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: as it was, so that the verb says what it does not understand."""
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_dispatch", seen.append)
    main(words.split())
    assert seen == [(words if passed_on is None else passed_on).split()]


def test_an_error_of_our_own_making_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_words: list[str]) -> int:
        raise ValueError("a fault in the program")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(ValueError, match="a fault in the program"):
        main(["train"])


def test_too_little_memory_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(_words: list[str]) -> int:
        torch.empty(2**50)
        return 0

    monkeypatch.setattr(cli, "_dispatch", allocate)
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("cabochon: out of memory")
    assert "cabochon plan" in said


def test_an_interrupt_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_module_runs_as_the_binary_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cabochon", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("cabochon ")


def test_the_flags_of_every_verb_are_the_frozen_ones() -> None:
    """See `options.py` for why, and for how to change them on purpose."""
    assert options.listing() == options.FROZEN.read_text(encoding="utf-8")
