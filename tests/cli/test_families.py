"""Folders of other families: their control tokens are not those of Gemma, and used as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import Workshop, call, texts, write_jsonl

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
END = "<|endoftext|>"


def words(*special: str, **named: str) -> Any:
    """A tokenizer in the manner of GPT-2, with these control tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def gpt2() -> tuple[Any, Any]:
    """One token begins, ends and pads."""
    config = transformers.GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128
    )
    model = transformers.GPT2LMHeadModel(config)
    return model, words(END, bos_token=END, eos_token=END, pad_token=END)


def llama() -> tuple[Any, Any]:
    """Padded with the end, as many are that were published without padding."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **SIZES))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return model, words("<s>", "</s>", **names)


def llama_without_padding() -> tuple[Any, Any]:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **SIZES))
    return model, words("<s>", "</s>", bos_token="<s>", eos_token="</s>")


def qwen() -> tuple[Any, Any]:
    """Nothing begins a text."""
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=400, **SIZES))
    return model, words(END, "<|im_end|>", eos_token="<|im_end|>", pad_token=END)


FAMILIES = [gpt2, llama, llama_without_padding, qwen]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.set_seed(0)
    place = tmp_path_factory.mktemp(request.param.__name__, numbered=False)
    model, tokenizer = request.param()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_it_writes(folder: Path) -> None:
    how = ("--max-new-tokens", 5, "--temperature", 0, "--json")
    done = call("generate", folder, "--prompt", "import json", *how)
    assert done.code == 0, done.err
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = front + tokenizer("import json", add_special_tokens=False)["input_ids"]
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=5,
        do_sample=False,
    )
    assert done.answer["tokens"] == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("ends", [(), ("--eos",)])
def test_it_is_judged(folder: Path, workshop: Workshop, ends: tuple[str, ...]) -> None:
    """Many documents in a batch, so in padding; one at a time, in none."""
    judge = ("evaluate", "perplexity", folder, workshop.corpus, "--json", *ends)
    together, apart = call(*judge), call(*judge, "--batch-size", 1)
    assert together.code == apart.code == 0, together.err
    assert together.answer["nats_per_token"] == pytest.approx(apart.answer["nats_per_token"])


def test_it_is_exported_as_it_is(folder: Path, tmp_path: Path) -> None:
    done = call("export", folder, tmp_path / "out")
    assert done.code == 0, done.err
    how = ("--prompt", "def ", "--max-new-tokens", 5, "--json")
    assert call("generate", tmp_path / "out", *how).out == call("generate", folder, *how).out


def test_its_text_is_looked_at(folder: Path, workshop: Workshop) -> None:
    done = call("data", "inspect", workshop.corpus, "--tokenizer", folder)
    assert done.code == 0, done.err


def test_a_prompt_of_nothing_needs_a_beginning(folder: Path) -> None:
    done = call("generate", folder, "--prompt", "", "--max-new-tokens", 2)
    has_bos = "bos_token" in json.loads((folder / "tokenizer_config.json").read_text())
    assert (done.code == 0) == has_bos
    assert has_bos or "the tokenizer has no BOS to begin with" in done.err


def test_only_what_has_its_own_padding_is_trained(
    folder: Path, workshop: Workshop, tmp_path: Path
) -> None:
    chats = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "1+1", "completion": "2"}])
    how = ("--model", folder, "--steps", 2, "--context", 64, "--threads", 1, "--batch-size", 2)
    expected = {
        "gpt2": "EOS and PAD are the same token",
        "llama": "EOS and PAD are the same token",
        "qwen": "the tokenizer has no bos token",
        "llama_without_padding": "",
    }[folder.name]
    done = call("train", "pretrain", "--data", workshop.corpus, *how, "--out", tmp_path / "run")
    assert expected in done.err
    assert (done.code == 0) == (not expected)
    tuned = call("train", "sft", "--data", chats, *how, "--out", tmp_path / "tuned")
    assert tuned.code == 1  # none of them has a chat template
    assert not (tmp_path / "tuned").exists()


def test_a_gemma_that_pads_with_its_end_writes(workshop: Workshop, tmp_path: Path) -> None:
    """As some tuned ones are published."""
    for pad in (1, None):
        folder = tmp_path / str(pad)
        shutil.copytree(workshop.model, folder)
        for file, change in (
            ("config.json", {"pad_token_id": pad, "cabochon": {}}),
            ("tokenizer_config.json", {"pad_token": "<eos>"}),
        ):
            values = json.loads((folder / file).read_text()) | change
            (folder / file).write_text(json.dumps(values))
        how = ("--prompt", "import", "--max-new-tokens", 4, "--json")
        done = call("generate", folder, *how)
        assert done.code == 0, done.err
        assert done.out == call("generate", workshop.model, *how).out
        assert call("export", folder, tmp_path / f"out-{pad}").code == 0
