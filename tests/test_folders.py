"""Model folders: what belongs together is loaded, what does not is refused by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cabochon
from cabochon.core import Key, TokenBatch
from cabochon.core.errors import FolderError, TokenizerMismatch
from cabochon.data.documents import Document
from cabochon.data.packing import pack_documents
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.folders import fingerprint, load_model
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma import Gemma, preset

TEXT = "def gem(facets: int) -> str:\n    return 'polished' * facets  # 1234\n"
OTHER = "while True: number = number // 17 + len([x for x in range(9)])\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], 330)


@pytest.fixture(scope="module")
def other() -> Tokenizer:
    return train_tokenizer([OTHER * 20], 330)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Gemma:
    return Gemma.init(replace(preset("gemma2-nano"), vocab_size=tokenizer.vocab_size), Key(0))


@pytest.fixture
def folder(model: Gemma, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    cabochon.save(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def logits(model, ids: list[int]) -> torch.Tensor:
    return model(TokenBatch.of([ids])).logits(slice(None))


def test_what_is_saved_is_what_is_loaded(folder: Path, model: Gemma, tokenizer: Tokenizer) -> None:
    loaded, read = cabochon.load(folder)
    assert isinstance(loaded, Gemma)
    assert loaded.config == model.config
    assert read.fingerprint() == tokenizer.fingerprint()
    ids = read.encode(TEXT, bos=True, eos=True)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_type_is_the_folders_unless_another_is_asked_for(folder: Path) -> None:
    assert cabochon.load(folder)[0].embedding.dtype is torch.float32
    assert cabochon.load(folder, dtype=torch.bfloat16)[0].embedding.dtype is torch.bfloat16


def test_transformers_reads_the_folder_and_what_it_writes_is_read_here(
    folder: Path, model: Gemma, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(TEXT)["input_ids"]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    words.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["cabochon"]
    cabochon.load(tmp_path / "again")


def test_another_tokenizer_of_the_same_size_is_refused(
    folder: Path, tokenizer: Tokenizer, other: Tokenizer
) -> None:
    assert other.vocab_size == tokenizer.vocab_size
    other.save(folder)
    with pytest.raises(TokenizerMismatch, match="another tokenizer than its model was made with"):
        cabochon.load(folder)


def test_a_save_that_is_interrupted_leaves_nothing_that_loads_as_a_mixture(
    folder: Path, model: Gemma, other: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a folder's tokenizer may go with weights that were made with another one."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cabochon.models.gemma.convert.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cabochon.save(model, other, folder)
    with pytest.raises(TokenizerMismatch, match="another tokenizer than its model was made with"):
        cabochon.load(folder)


def test_one_changed_merge_is_enough_to_be_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        cabochon.load(folder)


def test_layout_and_key_order_of_the_tokenizer_file_do_not_count(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    cabochon.load(folder)


def test_eos_that_is_also_padding_can_be_used_and_not_trained(
    folder: Path, model: Gemma, tmp_path: Path
) -> None:
    """Padding is masked by `documents`; rows to learn from are where EOS has to be its own."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"pad_token": "<eos>"}
    path.write_text(json.dumps(settings))
    cabochon.save(model, Tokenizer.load(folder), tmp_path / "padded")
    loaded, read = cabochon.load(tmp_path / "padded")
    ids = [[2, 10, 11, 12], [2, 13]]
    alone = [loaded(TokenBatch.of([each])).logits(slice(None)) for each in ids]
    for pad in (0, 1):
        for left in (False, True):
            batch = TokenBatch.of(ids, pad=pad, left=left)
            there = batch.documents.flatten() >= 0
            found = loaded(batch).logits(slice(None))[there]
            torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)
    with pytest.raises(TokenizerMismatch, match="EOS and PAD are the same token"):
        pack_documents(read, [Document(TEXT, "here")], 64)


def test_a_tokenizer_too_large_for_the_model_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = Gemma(replace(preset("gemma2-nano"), vocab_size=280))
    with pytest.raises(TokenizerMismatch, match="330 entries, the model's embedding 280 rows"):
        cabochon.save(small, tokenizer, tmp_path)


def test_rows_beyond_the_tokenizer_are_allowed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    padded = Gemma(replace(preset("gemma2-nano"), vocab_size=512))
    cabochon.save(padded, tokenizer, tmp_path)
    cabochon.load(tmp_path)


def test_control_tokens_of_other_ids_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(preset("gemma2-nano"), vocab_size=330, eos_id=7)
    with pytest.raises(TokenizerMismatch, match="the tokenizer's EOS is id 1, the model's is 7"):
        cabochon.save(Gemma(config), tokenizer, tmp_path)


def test_a_folder_without_its_tokenizer_or_a_shard_is_refused(
    model: Gemma, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cabochon.save(model, tokenizer, tmp_path, max_shard_bytes=100_000)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    kept = victim.read_bytes()
    victim.unlink()
    for read in (cabochon.load, load_model, fingerprint):
        with pytest.raises(FolderError, match=f"lacks {victim.name}"):
            read(tmp_path)
    victim.write_bytes(kept)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FolderError, match=r"no tokenizer\.json"):
        cabochon.load(tmp_path)
    load_model(tmp_path)


def test_a_fingerprint_is_the_digest_of_each_weight_file(
    model: Gemma, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cabochon.save(model, tokenizer, tmp_path, max_shard_bytes=100_000)
    found = fingerprint(tmp_path)
    assert len(found) > 1
    for name, digest in found.items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_a_foreign_model_is_loaded_and_saved_with_its_tokenizer(
    tokenizer: Tokenizer, other: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    model, read = cabochon.load(tmp_path / "theirs")
    assert isinstance(model, ForeignModel)
    cabochon.save(model, read, tmp_path / "ours")
    again, _ = cabochon.load(tmp_path / "ours")
    ids = read.encode(TEXT)
    assert torch.equal(logits(again, ids), logits(model, ids))
    other.save(tmp_path / "ours")
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        cabochon.load(tmp_path / "ours")


def test_saving_elsewhere_and_moving_the_folder_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    before = fingerprint(folder)
    shutil.move(folder, tmp_path / "moved")
    cabochon.load(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before


def test_the_package_knows_load_and_save_without_importing_torch() -> None:
    code = (
        "import sys, cabochon; assert 'torch' not in sys.modules; "
        "assert callable(cabochon.load) and callable(cabochon.save); "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = cabochon.lod
