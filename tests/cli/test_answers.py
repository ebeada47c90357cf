"""The verbs that look and answer: evaluate, doctor, data, export, report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from workshop import Workshop, call, write_jsonl

import cabochon
from cabochon.core import TokenBatch


def test_perplexity_counts_the_end_of_a_document_only_on_request(
    workshop: Workshop, tmp_path: Path
) -> None:
    rows = [{"text": "import os\n"}, {"text": "x = 1\n"}]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    model, tokenizer = cabochon.load(workshop.model)
    for words, eos in (((), False), (("--eos",), True)):
        answer = call("evaluate", "perplexity", workshop.model, file, "--json", *words).answer
        nats, tokens = 0.0, 0
        for row in rows:
            ids = tokenizer.encode(row["text"], bos=True, eos=eos)
            with torch.no_grad():
                logprob = model(TokenBatch.of([ids])).logits(slice(0, -1)).log_softmax(-1)
            nats -= logprob.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
            tokens += len(ids) - 1
        assert answer["tokens"] == tokens
        assert math.isclose(answer["nats_per_token"], nats / tokens, abs_tol=1e-4)
    readable = call("evaluate", "perplexity", workshop.model, file).out
    assert "nats per token" in readable


def test_the_doctor_finds_nothing_wrong_with_what_is_well(workshop: Workshop) -> None:
    words = ("--tokenizer", workshop.tokenizer, "--context", 64)
    for algorithm, data in (("pretrain", workshop.corpus), ("sft", workshop.chats)):
        done = call("doctor", algorithm, "--data", data, *words, "--json")
        assert done.code == 0, done.out
        assert done.answer["well"] is True
        assert all(check["well"] for check in done.answer["checks"])
    assert call("doctor", workshop.model).code == 0
    assert call("doctor", workshop.tokenizer).code == 0
    assert call("doctor", workshop.run).code == 0


def test_the_doctor_counts_markers_and_long_documents(workshop: Workshop) -> None:
    words = ("--data", workshop.corpus, "--tokenizer", workshop.tokenizer, "--context", 64)
    out = call("doctor", "pretrain", *words).out
    assert "30 BOS, 30 learned EOS" in out
    assert "30 are longer than the 64 of a row and are split" in out


def test_the_doctor_draws_the_loss_mask_token_by_token(workshop: Workshop, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "1+1", "completion": "2\n3"}])
    words = ("--data", file, "--tokenizer", workshop.tokenizer)
    out = call("doctor", "sft", *words).out
    drawn = out.split("tokens are learned:\n")[1]
    assert drawn.startswith("<bos><start_of_turn>user\\n\n1+1<end_of_turn>\\n\n<start_of_turn>")
    assert "model\\n\n[2][\\n]\n[3][<end_of_turn>]\\n\n" in drawn


def test_the_doctor_says_what_is_wrong_and_leaves_with_1(
    workshop: Workshop, tmp_path: Path
) -> None:
    long = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b " * 200}])
    words = ("--tokenizer", workshop.tokenizer, "--context", 64)
    for algorithm, data, said in (
        ("sft", long, "longer than the 64 of a row"),
        ("sft", tmp_path / "none.jsonl", "does not exist"),
        ("pretrain", long, "no field 'text'"),
    ):
        done = call("doctor", algorithm, "--data", data, *words)
        assert done.code == 1
        assert said in done.out
        assert "WRONG" in done.out
    nothing = call("doctor", "pretrain", *words, "--json")
    assert nothing.code == 1
    assert nothing.answer["well"] is False


def test_the_doctor_compares_a_teachers_vocabulary_by_content(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    done = call("data", "tokenizer", "--data", workshop.corpus, "--vocab-size", 300, "--out", other)
    assert done.code == 0
    words = ("--data", workshop.corpus, "--teacher", workshop.run)
    well = call("doctor", "pretrain", *words, "--tokenizer", workshop.tokenizer)
    assert "well   teacher's vocabulary" in well.out
    wrong = call("doctor", "pretrain", *words, "--tokenizer", other)
    assert wrong.code == 1
    assert "WRONG  teacher's vocabulary" in wrong.out
    assert "300 entries against 400" in wrong.out


def test_inspecting_shows_counts_and_a_sample(workshop: Workshop, tmp_path: Path) -> None:
    plain = call("data", "inspect", workshop.corpus, "--json").answer
    assert plain["documents"] == 30
    words = ("--tokenizer", workshop.tokenizer)
    counted = call("data", "inspect", workshop.corpus, *words, "--index", 2, "--json").answer
    tokenizer = cabochon.load(workshop.model)[1]
    text = json.loads(workshop.corpus.read_text().splitlines()[2])["text"]
    assert counted["sample"]["text"] == text
    assert counted["sample"]["ids"] == tokenizer.encode(text, bos=True, eos=True)
    assert counted["sample"]["learned"][0] is False
    assert all(counted["sample"]["learned"][1:])
    chats = call("data", "inspect", workshop.chats, *words, "--json").answer
    assert chats["conversations"] == 16
    assert chats["learned"] == 32
    beyond = call("data", "inspect", workshop.corpus, "--index", 99)
    assert beyond.code == 1
    assert "there is no 99" in beyond.err


def test_a_tokenizer_is_trained_and_says_what_it_makes_of_the_text(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = ("--data", workshop.corpus, "--vocab-size", 400, "--out", tmp_path / "tok", "--json")
    answer = call("data", "tokenizer", *words).answer
    assert answer["vocab_size"] == 400
    assert answer["fingerprint"] == cabochon.load(workshop.model)[1].fingerprint()
    assert answer["tokens"] < answer["characters"]


def test_an_exported_folder_is_read_by_transformers(workshop: Workshop, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    answer = call("export", workshop.run, tmp_path / "hf", "--json").answer
    assert set(answer["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    ours, tokenizer = cabochon.load(workshop.model)
    ids = tokenizer.encode("import json", bos=True)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        found = ours(TokenBatch.of([ids])).logits(slice(None))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    again = call("export", workshop.run, tmp_path / "hf")
    assert again.code == 1
    assert "exists already" in again.err


def test_an_export_can_change_the_type_of_the_weights(workshop: Workshop, tmp_path: Path) -> None:
    assert call("export", workshop.run, tmp_path / "b", "--precision", "bf16").code == 0
    model, _ = cabochon.load(tmp_path / "b")
    assert model.embedding.dtype == torch.bfloat16


def test_a_gguf_file_holds_the_model(workshop: Workshop, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    answer = call("export", workshop.run, out, "--format", "gguf", "--json").answer
    assert answer["files"] == {"model.gguf": out.stat().st_size}
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.architecture"].contents() == "gemma2"
    assert any(tensor.name == "token_embd.weight" for tensor in reader.tensors)


def test_a_report_is_one_page(workshop: Workshop, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert workshop.train("--out", run, "--steps", 2).code == 0
    page = Path(call("report", run, "--json").answer["report"])
    assert page == run / "report.html"
    assert "<html" in page.read_text(encoding="utf-8")
