"""Writing: what `generate` and `chat` print, and that every way of asking gives the same."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workshop import Workshop, call, write_jsonl

import cabochon
from cabochon.cli.generate import stop_ids
from cabochon.core import Key, TokenBatch
from cabochon.data.chat import Message, encode_prompt
from cabochon.data.tokenizer import train_tokenizer
from cabochon.models.gemma import Gemma, preset


def test_the_answer_holds_tokens_text_and_their_logprobs(workshop: Workshop) -> None:
    words = ("--prompt", "import json", "--max-new-tokens", 5, "--temperature", 0, "--json")
    answer = call("generate", workshop.model, *words).answer
    model, tokenizer = cabochon.load(workshop.model)
    assert answer["text"] == tokenizer.decode(answer["tokens"])
    prompt = tokenizer.encode("import json", bos=True)
    batch = TokenBatch.of([[*prompt, *answer["tokens"]]])
    with torch.no_grad():
        logits = model(batch).logits(slice(len(prompt) - 1, -1))
    assert logits.argmax(-1).tolist() == answer["tokens"]
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, atol=1e-4, rtol=0)


def test_a_run_stands_for_the_model_of_its_last_checkpoint(workshop: Workshop) -> None:
    words = ("--prompt", "def ", "--max-new-tokens", 5, "--json")
    by_run, by_folder = (call("generate", at, *words) for at in (workshop.run, workshop.model))
    assert by_run.answer == by_folder.answer


def test_prompts_come_from_flags_files_and_pipes_alike(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("def main\n\nimport os\n")
    records = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def main"}, {"text": "import os"}])
    how = ("--max-new-tokens", 4, "--seed", 3, "--json")
    by_flag = call("generate", workshop.model, "--prompt", "def main", "import os", *how).out
    assert len(by_flag.splitlines()) == 2
    assert call("generate", workshop.model, "--file", lines, *how).out == by_flag
    assert call("generate", workshop.model, "--file", records, *how).out == by_flag
    monkeypatch.setattr("sys.stdin", io.StringIO("def main\nimport os\n"))
    assert call("generate", workshop.model, "--file", "-", *how).out == by_flag
    monkeypatch.setattr("sys.stdin", io.StringIO("def main\n"))
    piped = call("generate", workshop.model, *how).out
    assert piped == call("generate", workshop.model, "--prompt", "def main", *how).out


@pytest.mark.parametrize("after", [(), ("--json",)])
def test_a_prompt_without_its_text_is_a_mistake(
    workshop: Workshop, after: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not go on from standard input as if no prompt had been asked for."""
    monkeypatch.setattr("sys.stdin", io.StringIO("def main\n"))
    done = call("generate", workshop.model, "--max-new-tokens", 2, "--prompt", *after)
    assert done.code == 2
    assert "--prompt needs at least one value after it" in done.err
    assert done.out == ""


def test_a_second_prompt_flag_does_not_replace_the_first(workshop: Workshop) -> None:
    done = call("generate", workshop.model, "--prompt", "a", "--prompt", "b")
    assert done.code == 2
    assert "--prompt is given twice" in done.err


def test_a_line_of_a_file_ends_at_a_line_feed_alone(workshop: Workshop, tmp_path: Path) -> None:
    """U+2028 may stand unescaped in JSON; a form feed stands in many sources."""
    odd = "a\u2028b\x0cc\x85d"
    records = tmp_path / "p.jsonl"
    records.write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n")
    (tmp_path / "p.txt").write_text(odd + "\n")
    how = ("--max-new-tokens", 3, "--seed", 3, "--json")
    expected = call("generate", workshop.model, "--prompt", odd, *how).out
    for file in (records, tmp_path / "p.txt"):
        assert call("generate", workshop.model, "--file", file, *how).out == expected


def test_streaming_writes_the_text_that_the_answer_holds(workshop: Workshop) -> None:
    words = ("generate", workshop.model, "--prompt", "é", "--max-new-tokens", 40, "--seed", 1)
    assert call(*words).out == call(*words, "--json").answer["text"] + "\n"


def test_samples_differ_and_each_comes_back_from_its_seed(workshop: Workshop) -> None:
    words = ("generate", workshop.model, "--prompt", "x", "--max-new-tokens", 8, "--json")
    several = [json.loads(line) for line in call(*words, "--samples", 3).out.splitlines()]
    assert [each["sample"] for each in several] == [0, 1, 2]
    assert len({each["text"] for each in several}) == 3
    assert call(*words).answer["tokens"] == several[0]["tokens"]
    assert call(*words, "--seed", 1).answer["tokens"] != several[0]["tokens"]


def test_a_stop_text_ends_a_completion_and_is_cut_off(workshop: Workshop) -> None:
    words = ("generate", workshop.model, "--prompt", "x", "--max-new-tokens", 30)
    text = call(*words, "--json").answer["text"]
    stop = text[6:8]
    done = call(*words, "--stop", stop, "--json").answer
    assert done["text"] == text[: text.index(stop)]
    assert done["stopped"] is True
    assert len(done["tokens"]) == len(done["logprobs"]) < 30
    assert call(*words, "--stop", stop).out == done["text"] + "\n"


def test_a_stop_token_may_be_named(workshop: Workshop) -> None:
    _, tokenizer = cabochon.load(workshop.model)
    end = tokenizer.end_of_turn_id
    assert stop_ids(tokenizer, (), chat=False) == (tokenizer.eos_id,)
    assert stop_ids(tokenizer, (), chat=True) == (tokenizer.eos_id, end)
    assert stop_ids(tokenizer, ("<end_of_turn>", "plain"), chat=False) == (tokenizer.eos_id, end)


def test_settings_out_of_range_are_refused(workshop: Workshop) -> None:
    for words, said in (
        (("--temperature", -1), "temperature"),
        (("--top-p", 0), "top_p"),
        (("--max-new-tokens", 0), "max_new_tokens"),
        (("--samples", 0), "samples"),
        (("--device", "tpu9"), "no device"),
    ):
        done = call("generate", workshop.model, "--prompt", "x", "--json", *words)
        assert done.code == 2
        assert said in done.err
        assert done.out == ""


def test_a_prompt_as_long_as_the_context_is_refused(workshop: Workshop) -> None:
    done = call("generate", workshop.model, "--prompt", "word " * 300)
    assert done.code == 1
    assert "the model's context is 256" in done.err


def chat(monkeypatch: pytest.MonkeyPatch, model: Path, said: str, *words: object):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return call("chat", model, "--max-new-tokens", 6, "--temperature", 0, *words)


def test_a_piped_chat_answers_each_line_through_the_template(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = chat(monkeypatch, workshop.model, "hello\n\nand you?\n", "--json")
    first, second = (json.loads(line) for line in done.out.splitlines())
    _, tokenizer = cabochon.load(workshop.model)
    history = [Message("user", "hello"), Message("model", first["text"])]
    prompt = encode_prompt(tokenizer, [*history, Message("user", "and you?")])
    model, _ = cabochon.load(workshop.model)
    with torch.no_grad():
        logits = model(TokenBatch.of([prompt])).logits(slice(-1, None))
    assert second["tokens"][0] == logits.argmax().item()


def test_reset_forgets_and_quit_leaves(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chat(monkeypatch, workshop.model, "a\nb\n/reset\na\n/quit\nc\n", "--json")
    answers = [json.loads(line)["tokens"] for line in done.out.splitlines()]
    assert len(answers) == 3
    assert answers[2] == answers[0]


def test_a_long_chat_drops_its_oldest_turns_and_says_so(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = chat(monkeypatch, workshop.model, ("word " * 30 + "\n") * 4)
    assert done.code == 0
    assert len(done.out.splitlines()) >= 4
    assert "no longer fit into 256 tokens" in done.err


# --- how the engine is asked to write ---


def greedy(workshop: Workshop, *words: object) -> dict[str, object]:
    done = call(
        "generate", workshop.model, "--prompt", "import ", "--max-new-tokens", 12, "--temperature",
        0, "--json", *words,
    )  # fmt: skip
    assert done.code == 0, done.err
    answer: dict[str, object] = done.answer
    return answer


@pytest.mark.parametrize("words", [(), ("--stop", "e")])
def test_a_draft_changes_nothing_of_what_greedy_writes(
    workshop: Workshop, words: tuple[object, ...]
) -> None:
    plain = greedy(workshop, *words)
    drafted = greedy(workshop, "--draft", workshop.run, "--ahead", 9, *words)
    assert drafted.pop("logprobs") == pytest.approx(plain.pop("logprobs"), abs=1e-4)
    assert drafted == plain


def test_guidance_of_strength_one_is_none_and_more_is_something(workshop: Workshop) -> None:
    assert greedy(workshop, "--guidance", 1) == greedy(workshop)
    strong = greedy(workshop, "--guidance", 3, "--negative", "import ")
    # Both streams read the same: their combination is the model, to rounding.
    assert strong["tokens"] == greedy(workshop)["tokens"]
    assert greedy(workshop, "--guidance", 3)["logprobs"] != greedy(workshop)["logprobs"]


def test_eight_bits_are_near_the_whole(workshop: Workshop) -> None:
    rounded, whole = greedy(workshop, "--int8"), greedy(workshop)
    assert rounded["logprobs"][0] == pytest.approx(whole["logprobs"][0], abs=0.05)
    assert rounded["logprobs"] != whole["logprobs"]


def test_an_answer_says_what_ended_it(workshop: Workshop) -> None:
    answer = greedy(workshop)
    assert (answer["ended"], answer["stopped"], len(answer["tokens"])) == ("length", False, 12)
    stopped = greedy(workshop, "--stop", answer["text"][3])
    assert (stopped["ended"], stopped["stopped"]) == ("stop", True)
    assert stopped["text"] == answer["text"][: answer["text"].index(answer["text"][3])]
    long = call(
        "generate", workshop.model, "--prompt", "x", "--max-new-tokens", 10_000, "--json",
        "--temperature", 0,
    ).answer  # fmt: skip
    model, _ = cabochon.load(workshop.model)
    if not long["stopped"]:
        assert long["ended"] == "context"
        assert len(long["tokens"]) < model.context


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--negative", "x"), "no effect at --guidance 1"),
        (("--stop", ""), "at once"),
        (("--max-new-tokens", 0), "max_new_tokens must be at least 1"),
        (("--temperature", -1), "temperature must be finite and at least 0"),
        (("--ahead", 9), "--ahead is how far a --draft looks"),
        (("--guidance", -1), "must be at least 0"),
        (("--backend", "transformers", "--int8"), "the engine's"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(
    workshop: Workshop, words: tuple[object, ...], message: str
) -> None:
    done = call("generate", workshop.model, "--prompt", "x", *words)
    assert done.code != 0
    assert message in done.err
    assert done.out == ""


def test_a_draft_with_another_tokenizer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["something else entirely"], 280)
    config = replace(preset("gemma2-nano"), vocab_size=tokenizer.vocab_size, layers=1)
    cabochon.save(Gemma.init(config, Key(0)), tokenizer, tmp_path / "draft")
    done = call("generate", workshop.model, "--prompt", "x", "--draft", tmp_path / "draft")
    assert done.code != 0
    assert "another tokenizer" in done.err
