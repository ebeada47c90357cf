"""`generate` with other backends: the same answers, and flags that do not fit are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from workshop import Workshop, call

import cabochon

sys.path.append(str(Path(__file__).parents[1] / "generation"))
import local_server

WORDS = ("--prompt", "import json", "def ", "--max-new-tokens", 6, "--samples", 2, "--json")


def test_transformers_answers_as_the_engine_does(workshop: Workshop) -> None:
    pytest.importorskip("transformers")
    words = ("generate", workshop.run, *WORDS, "--top-k", 20)
    theirs = call(*words, "--backend", "transformers").out.splitlines()
    ours = call(*words).out.splitlines()
    assert len(ours) == 4
    for found, expected in zip(map(json.loads, theirs), map(json.loads, ours), strict=True):
        logprobs = (torch.tensor(each.pop("logprobs")) for each in (found, expected))
        torch.testing.assert_close(*logprobs, atol=1e-4, rtol=0)
        assert found == expected


def test_a_server_answers_in_the_same_form(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("httpx2")
    model, tokenizer = cabochon.load(workshop.model)
    world = local_server.World(model=model)
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    with local_server.serving(world) as transport:
        words = ("generate", workshop.model, "--backend", "vllm", "--url", transport.url)
        again = [call(*words, *WORDS, "--temperature", 0) for _ in range(2)]
        plain = call(*words, "--prompt", "def ", "--max-new-tokens", 6, "--temperature", 0)
    assert again[0].out == again[1].out
    expected = call("generate", workshop.model, *WORDS, "--temperature", 0)
    for found, other in zip(again[0].out.splitlines(), expected.out.splitlines(), strict=True):
        one, two = json.loads(found), json.loads(other)
        assert one.keys() == two.keys()
        assert one["tokens"] == two["tokens"]
        assert one["text"] == tokenizer.decode(one["tokens"])
    assert plain.out == json.loads(again[0].out.splitlines()[2])["text"] + "\n"
    assert plain.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "vllm"), "needs the server's --url"),
        (("--url", "http://127.0.0.1:1"), "--url is for --backend vllm"),
        (("--backend", "vllm", "--url", "127.0.0.1:1"), "is no address"),
        (("--backend", "vllm", "--url", "http://h", "--device", "cpu"), "the server's own"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    workshop: Workshop, words: tuple[str, ...], message: str
) -> None:
    done = call("generate", workshop.tokenizer, "--prompt", "x", *words)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
