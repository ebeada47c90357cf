"""The demo's alignment: what is a function, what is good, and the same bits after interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_recipe import write_lines

from cabochon import folders
from cabochon.core import Completion, Group, Key
from cabochon.core.errors import DataError
from cabochon.data.corpus import Summary
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines import functions
from cabochon.pipelines.functions import conversation_of
from cabochon.pipelines.recipe import Phase
from cabochon.pipelines.stages import Event


def summary(function: str, said: str = "Return the area.") -> Summary:
    return Summary(function=function, summary=said, source="shapes.py:1")


@pytest.mark.parametrize(
    ("function", "head"),
    [
        ("def area(self):\n    return self.a\n", "def area(self):\n"),
        (
            "@cached\ndef area(\n    self,\n):\n    return 1\n",
            "@cached\ndef area(\n    self,\n):\n",
        ),
        ("async def area():\n    @wraps\n    def f(): pass\n    return f\n", "async def area():\n"),
        ("def area(self):\n    # squares\n    return 1\n", "def area(self):\n    # squares\n"),
    ],
)
def test_a_function_is_a_signature_and_the_rest_with_its_sentence(function: str, head: str) -> None:
    found = conversation_of(summary(function))
    assert found is not None
    assert found["prompt"] == head
    rest = found["completion"]
    assert rest.startswith('    """Return the area."""\n')
    assert found["prompt"] + rest.replace('    """Return the area."""\n', "", 1) == function


def test_a_sentence_without_an_end_gets_one_and_what_makes_no_docstring_is_left_out() -> None:
    found = conversation_of(summary("def f():\n    pass\n", "Return nothing"))
    assert found is not None
    assert '"""Return nothing."""' in found["completion"]
    for function, said in (
        ("def f(): return 1\n", "Return one."),  # the body is on the signature's line
        ("    def f():\n  return 1\n", "Return one."),  # no Python by itself
        ("def f():\n    return 1\n", 'Say """ twice.'),  # ends the docstring
        ("def f():\n    return 1\n", "Return one. Or two."),
    ):
        assert conversation_of(summary(function, said)) is None


def texts() -> list[dict[str, str]]:
    names = [f"{a}_{b}" for a in ("get", "set", "read", "make") for b in "abcdefgh"]
    return [
        {"prompt": f"def {name}(self):\n", "completion": f'    """Do {name}."""\n    return {n}\n'}
        for n, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that writes at random, functions to learn, functions to be judged on."""
    folder = tmp_path_factory.mktemp("given")
    rows = texts()
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], 300)
    shape = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "ffn_width": 32}
    config = GemmaConfig(
        vocab_size=tokenizer.vocab_size,
        **shape,
        query_scalar=8,
        window=8,
        attention_cap=50.0,
        final_cap=30.0,
        post_norms=True,
        context=96,
        pad_id=tokenizer.control("pad"),
        eos_id=tokenizer.learnable_end(),
        bos_id=tokenizer.control("bos"),
    )
    folders.save(Gemma.init(config, Key(0, ("student",))), tokenizer, folder / "student")
    write_lines(folder / "functions.jsonl", rows[:24])
    write_lines(folder / "held_out_functions.jsonl", rows[20:])  # four stand on both sides
    return folder


def align(given: Path, out: Path, observe: Any = lambda event: None) -> dict[str, Any]:
    config = functions.Config(
        write=Phase(steps=3, rows=4, learning_rate=1e-2),
        bond=Phase(steps=2, rows=4, learning_rate=1e-2),
        member=Phase(steps=2, rows=4, learning_rate=1e-2),
        samples=2,
        new_tokens=40,
        held_out=6,
    )
    out.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(given / "student")
    return functions.aligned(config, out, tokenizer, given / "student", given, observe)


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return align(given, tmp_path_factory.mktemp("whole"))


def test_nobody_is_judged_on_a_signature_that_was_learned(
    given: Path, whole: dict[str, Any]
) -> None:
    lines = (given / "functions.jsonl").read_text().splitlines()
    learned = {json.loads(line)["prompt"] for line in lines}
    assert len(whole["samples"]) == 6
    assert learned.isdisjoint(sample["prompt"] for sample in whole["samples"])
    assert whole["prompts"] == {"learned": 24, "held_out": 6}


def test_policies_and_front_go_from_the_writer_to_the_merge(whole: dict[str, Any]) -> None:
    names = [each["name"] for each in whole["policies"]]
    assert names == ["writer", "bond", "member_1", "member_2", "merged"]
    (front,) = whole["fronts"]
    assert [point["label"] for point in front["points"]] == ["0", "0.3", "0.5", "0.8", "1"]
    assert abs(front["points"][0]["kl"]) < 1e-5
    assert front["points"][-1]["kl"] == whole["policies"][-1]["kl"]["mean"]
    assert whole["gain"]["of"] == "parses"


@pytest.mark.parametrize("stage", ["writer", "bond", "iteration_1_member_2", "evaluation"])
def test_interrupted_it_ends_with_the_same_figures(
    stage: str, given: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and (event.step is not None or stage == "evaluation"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(given, tmp_path / "out", interrupt)
    assert align(given, tmp_path / "out") == whole


def test_the_reward_is_half_for_python_and_half_for_its_sentence(given: Path) -> None:
    tokenizer = Tokenizer.load(given / "student")

    def completion(text: str) -> Completion:
        tokens = torch.tensor(tokenizer.encode(text))
        zeros = torch.zeros(len(tokens))
        return Completion(tokens=tokens, logprob=zeros, model_logprob=zeros, stopped=True)

    group = Group(
        prompt=torch.tensor(tokenizer.encode("def f(x):\n")),
        completions=tuple(
            map(
                completion,
                ('    """Do it."""\n    return x\n', "    return x\n", "    return (x\n"),
            )
        ),
    )
    assert functions.reward(tokenizer)([group]).tolist() == [[1.0, 0.5, 0.0]]


def test_texts_without_signatures_of_their_own_are_refused(given: Path, tmp_path: Path) -> None:
    for name in ("functions.jsonl", "held_out_functions.jsonl"):
        write_lines(tmp_path / name, texts()[:5])
    tokenizer = Tokenizer.load(given / "student")
    phase = Phase(steps=1, rows=1, learning_rate=1e-3)
    config = functions.Config(write=phase, bond=phase, member=phase)
    with pytest.raises(DataError, match="0 held-out signatures"):
        functions.aligned(
            config, tmp_path, tokenizer, given / "student", tmp_path, lambda event: None
        )
