"""A Gemma as one GGUF file, which llama.cpp and its kin run.

GGUF has no place for a Gemma 2's query scalar: each reader assumes one. So the difference is folded
into the query matrix, exactly where the ratio is a power of four, up to rounding elsewhere. Norm
weights are stored as the factors they are, 1 + w.

The tokens go along with scores by which llama.cpp merges them greedily; it knows nothing of a
pattern that cuts text before merging, so it may split runs of blanks otherwise than we do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cabochon.core.errors import ConfigError, FolderError, MissingExtra
from cabochon.files import whole
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import hf_tensors
from cabochon.models.gemma.decoder import Gemma
from cabochon.weight_files import read_json

__all__ = ["SavedTokenizer", "write_gguf"]


class SavedTokenizer(Protocol):
    """A tokenizer that can write tokenizer.json and tokenizer_config.json."""

    def save(self, folder: Path, /) -> None:
        """Write the files into `folder`."""
        ...


_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NORMS = {
    False: {"post_attention_layernorm": "ffn_norm"},
    True: {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def write_gguf(
    model: Gemma, tokenizer: SavedTokenizer, path: Path | str, *, assumed_scalar: int | None = None
) -> None:
    """Write model and tokenizer as one GGUF file, matrices in the type of the parameters.

    Args:
        model: float32, float16 or bfloat16; norms are stored in float32.
        tokenizer: its vocabulary goes into the file; BPE with byte fallback.
        path: of the file, replaced if it exists.
        assumed_scalar: the query scalar that the reader will assume; None: what llama.cpp does,
            the head width (for 46 layers, those of the 27B, width / heads). transformers assumes
            256.

    Raises:
        MissingExtra: gguf is not installed.
        ConfigError: a Gemma 2 without soft-caps, which readers assume, or a tokenizer of another
            kind.
        FolderError: the file could not be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("gguf", "gguf", "writing a GGUF file") from error
    config, path = model.config, Path(path)
    if config.post_norms and (config.attention_cap is None or config.final_cap is None):
        raise ConfigError(
            "readers of GGUF take a Gemma 2 to have both soft-caps (50 and 30 where none is "
            f"given), this one has {config.attention_cap} and {config.final_cap}; export it as a "
            "Hugging Face folder instead"
        )
    kind = "gemma2" if config.post_norms else "gemma"
    query_gain = ((assumed_scalar or _assumed_by_llama_cpp(config)) / config.query_scalar) ** 0.5
    try:
        with whole(path) as partial:
            writer = gguf.GGUFWriter(partial, kind)
            _add_shape(writer, config)
            _add_tokens(writer, gguf, config, tokenizer)
            for name, tensor in hf_tensors(model):
                _add_tensor(writer, gguf, _name(name, config), tensor.detach().cpu(), query_gain)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise FolderError(f"{path} could not be written: {error}") from error


def _assumed_by_llama_cpp(config: GemmaConfig) -> int:
    """The scalar of its attention, which it takes from the number of layers."""
    if config.post_norms and config.layers == 46:
        return config.width // config.heads
    return config.head_width


def _add_shape(writer: Any, config: GemmaConfig) -> None:
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)
    if config.post_norms:
        writer.add_sliding_window(config.window or config.context)
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.final_cap)


def _add_tokens(writer: Any, gguf: Any, config: GemmaConfig, tokenizer: SavedTokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        content: dict[str, Any] = read_json(Path(folder) / "tokenizer.json")
        template = Path(folder) / "chat_template.jinja"
        chat = template.read_text(encoding="utf-8") if template.is_file() else None
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ConfigError(
            f"the tokenizer is {model.get('type')} without byte fallback; a Gemma's GGUF file "
            "holds BPE with it"
        )
    ranks = {"".join(_pair(merge)): rank for rank, merge in enumerate(model["merges"])}
    kinds = gguf.TokenType
    pieces = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [kinds.UNUSED] * config.vocab_size
    for piece, i in model["vocab"].items():
        pieces[i], types[i] = piece.replace(" ", "\u2581"), kinds.NORMAL
        if len(piece) == 6 and piece.startswith("<0x"):
            types[i] = kinds.BYTE
    for token in content["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
    # Of two neighbours the reader joins those whose whole scores highest: the earliest merge.
    scores = [-float(ranks.get(piece.replace("\u2581", " "), len(ranks))) for piece in pieces]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    if config.pad_id is not None:
        writer.add_pad_token_id(config.pad_id)
    writer.add_eos_token_id(config.eos_id)
    writer.add_bos_token_id(config.bos_id)
    if (unknown := model.get("unk_token")) in model["vocab"]:
        writer.add_unk_token_id(model["vocab"][unknown])
    if "<end_of_turn>" in pieces:
        writer.add_eot_token_id(pieces.index("<end_of_turn>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat is not None:
        writer.add_chat_template(chat)


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor, query_gain: float) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, (1.0 + tensor.float()).numpy())
        return
    if name.endswith("attn_q.weight") and query_gain != 1.0:
        tensor = (tensor.double() * query_gain).to(tensor.dtype)
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        return
    writer.add_tensor(name, tensor.contiguous().numpy())


def _name(hf_name: str, config: GemmaConfig) -> str:
    stem = hf_name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{(_NAMES | _NORMS[config.post_norms])[part]}.weight"
