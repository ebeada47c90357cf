"""GGUF files: what transformers reads back from one computes what the model computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_gemma import hf_logits, random_rows, row_logits

from cabochon.core import Key
from cabochon.core.errors import ConfigError, FolderError
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma import Gemma, GemmaConfig, preset
from cabochon.models.gemma.gguf import write_gguf

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = "def gem(facets: int) -> str:\n    return 'polished' * facets  # 1234\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], 330)


def model_of(config: GemmaConfig, dtype: torch.dtype = torch.float32) -> Gemma:
    model = Gemma.init(config, Key(0), dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape).to(dtype) * (0.3 if weight.ndim == 1 else 0.1))
    return model


def read_back(path: Path, **changes: Any) -> Any:
    """Through the reader of transformers, which needs accelerate only for its outer shell."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    values = load_gguf_checkpoint(str(path))["config"]
    config = transformers.Gemma2Config(**values | changes, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    content = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    model.load_state_dict(content["tensors"], strict=False)
    assert content["tensors"].keys() == model.state_dict().keys() - {"lm_head.weight"}
    return model


@pytest.mark.parametrize("scalar", [32, 256, 48])
def test_what_transformers_reads_back_computes_the_same(
    scalar: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(
        preset("gemma2-nano"), vocab_size=340, query_scalar=scalar, window=6, layers=3, width=96
    )
    model = model_of(config)
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, path, assumed_scalar=256)
    (tokens,) = random_rows(30, vocab=330)
    expected = row_logits(model, tokens)
    torch.testing.assert_close(hf_logits(read_back(path), tokens), expected, atol=1e-4, rtol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_by_default_the_scalar_is_the_one_llama_cpp_assumes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(preset("gemma2-nano"), vocab_size=330, query_scalar=100)
    model = model_of(config)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    (tokens,) = random_rows(20, vocab=330)
    theirs = read_back(tmp_path / "model.gguf", query_pre_attn_scalar=config.head_width)
    torch.testing.assert_close(
        hf_logits(theirs, tokens), row_logits(model, tokens), atol=1e-4, rtol=0
    )


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_27b_needs_no_folding_for_llama_cpp(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(preset("gemma2-27b"), vocab_size=330, width=96, heads=2, kv_heads=1)
    config = replace(config, head_width=8, ffn_width=16, query_scalar=48)
    model = model_of(config)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    stored = tensors(tmp_path / "model.gguf")["blk.0.attn_q.weight"].data
    assert np.array_equal(stored, model.blocks[0].qkv[:16].detach().numpy())


def test_a_gemma_1_is_written_with_its_own_names_and_factors(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(replace(preset("gemma-nano"), vocab_size=330))
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    names = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA]}
    expected = {f"{name.format(bid=layer)}.weight" for name in names for layer in range(2)}
    assert found.keys() == expected
    norm = found["blk.1.ffn_norm.weight"].data
    assert np.array_equal(norm, 1.0 + model.blocks[1].ffn_norm.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_matrices_is_kept(
    dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(replace(preset("gemma2-nano"), vocab_size=330), dtype)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["output_norm.weight"] == "F32"
    stored = found["blk.0.ffn_down.weight"]
    assert stored.tensor_type.name == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    values = gguf.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(values, model.blocks[0].ffn_out.detach().float().numpy())


def test_the_vocabulary_goes_along(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_gguf(
        Gemma(replace(preset("gemma2-nano"), vocab_size=340)), tokenizer, tmp_path / "model.gguf"
    )
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    pieces = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    assert len(pieces) == len(types) == len(scores) == 340
    assert pieces[:3] == ["<pad>", "<eos>", "<bos>"]
    assert types[1] == gguf.TokenType.CONTROL
    assert types[pieces.index("<0x0A>")] == gguf.TokenType.BYTE
    assert types[339] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.eot_token_id"].contents() == pieces.index("<end_of_turn>")
    (polished,) = tokenizer.encode("polis")
    assert pieces[polished] == "polis"
    assert scores[polished] < scores[pieces.index("lis")] < 0 or scores[pieces.index("lis")] == 0
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_a_model_without_caps_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Gemma(replace(preset("gemma2-nano"), vocab_size=330, attention_cap=None))
    with pytest.raises(ConfigError, match="both soft-caps"):
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Gemma(replace(preset("gemma2-nano"), vocab_size=330))
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"model\.gguf could not be written"):
        write_gguf(model, tokenizer, tmp_path / "file" / "model.gguf")
