"""Gemma to and from Hugging Face folders: names, shapes and types, strictly.

q, k, v and gate, up are separate tensors there and rows of one matrix here; nothing else changes,
so that a folder read and written again has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from cabochon.core.errors import WeightsMismatch
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.hf_config import config_from_hf, config_to_hf
from cabochon.models.shards import Shards, write_shards
from cabochon.weight_files import read_json, write_json

__all__ = ["hf_tensors", "read_gemma", "write_gemma"]

_HEAD = "lm_head.weight"


def read_gemma(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    beside: frozenset[str] = frozenset(),
) -> Gemma:
    """The Gemma in a Hugging Face folder.

    Args:
        folder: config.json and safetensors, in one file or several.
        dtype: cast to this type; None keeps the type of the files, which must then be one.
        device: where the parameters go.
        beside: names of tensors that are no part of the decoder and may stand beside it.

    Raises:
        FolderError: a file is absent, incomplete or damaged.
        ConfigError: config.json describes a model that this decoder does not compute.
        WeightsMismatch: a tensor is missing, surplus, misshaped or of another type; it is named.
    """
    folder = Path(folder)
    config = config_from_hf(read_json(folder / "config.json"))
    shards = Shards(folder)
    # The configuration may claim any size: nothing is built by it before the files agree.
    if config.layers > len(shards.names):
        raise WeightsMismatch(
            f"config.json of {folder} says {config.layers} layers, the files hold only "
            f"{len(shards.names)} tensors; they are of different models"
        )
    try:
        model = Gemma(config, device="meta")
    except RuntimeError as error:
        raise WeightsMismatch(
            f"config.json of {folder} describes tensors larger than any can be ({error}); correct "
            "it to what the files hold"
        ) from error
    parts = _parts(model)
    _check_names(shards, parts, beside)
    _check_shapes(shards, parts, model, folder)
    dtype = dtype or _common_dtype(shards, beside)
    weights = {
        name: torch.empty(weight.shape, dtype=dtype, device=device)
        for name, weight in model.named_parameters()
    }
    for hf_name, (name, first, rows) in parts.items():
        weights[name][first : first + rows].copy_(shards.tensor(hf_name))
    _check_head(shards)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_gemma(
    model: Gemma,
    folder: Path | str,
    *,
    max_shard_bytes: int = 4 * 1024**3,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and safetensors that transformers reads, in the type of the parameters.

    Args:
        model: a Gemma with weights.
        folder: made if absent; weights of an earlier save in it are replaced.
        max_shard_bytes: of one safetensors file; larger models are split under an index.
        beside: further tensors, by the names that they get in the files.

    Raises:
        FolderError: a file could not be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_hf(model.config)
    config["dtype"] = str(model.embedding.dtype).removeprefix("torch.")
    write_shards(folder, {**dict(hf_tensors(model)), **(beside or {})}, max_shard_bytes)
    write_json(folder / "config.json", config)


def hf_tensors(model: Gemma) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name, as views of the parameters."""
    weights = dict(model.named_parameters())
    for hf_name, (name, first, rows) in _parts(model).items():
        yield hf_name, weights[name][first : first + rows]


def _parts(model: Gemma) -> dict[str, tuple[str, int, int]]:
    """Hugging Face name -> (our name, first row, rows) of every tensor, in the order of files."""
    config = model.config
    query, key = config.heads * config.head_width, config.kv_heads * config.head_width
    after = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    block = [
        ("input_layernorm", "attention_norm", 0, config.width),
        ("self_attn.q_proj", "qkv", 0, query),
        ("self_attn.k_proj", "qkv", query, key),
        ("self_attn.v_proj", "qkv", query + key, key),
        ("self_attn.o_proj", "attention_out", 0, config.width),
        (after, "ffn_norm", 0, config.width),
        ("mlp.gate_proj", "gate_up", 0, config.ffn_width),
        ("mlp.up_proj", "gate_up", config.ffn_width, config.ffn_width),
        ("mlp.down_proj", "ffn_out", 0, config.width),
    ]
    if config.post_norms:
        block.append(("post_attention_layernorm", "attention_post_norm", 0, config.width))
        block.append(("post_feedforward_layernorm", "ffn_post_norm", 0, config.width))
    parts = {"model.embed_tokens.weight": ("embedding", 0, config.vocab_size)}
    for layer in range(config.layers):
        for hf_name, name, first, rows in block:
            parts[f"model.layers.{layer}.{hf_name}.weight"] = (
                f"blocks.{layer}.{name}",
                first,
                rows,
            )
    parts["model.norm.weight"] = ("final_norm", 0, config.width)
    return parts


def _check_names(shards: Shards, parts: Mapping[str, object], beside: frozenset[str]) -> None:
    missing = [name for name in parts if name not in shards.names]
    surplus = sorted(shards.names - parts.keys() - {_HEAD} - beside)
    if missing:
        near = get_close_matches(missing[0], surplus, n=1)
        hint = f" (is {near[0]} meant?)" if near else ""
        raise WeightsMismatch(f"the files lack {_listed(missing)}{hint}")
    if surplus:
        raise WeightsMismatch(
            f"the files hold {_listed(surplus)}, which the configuration has no place for"
        )


def _check_shapes(
    shards: Shards, parts: Mapping[str, tuple[str, int, int]], model: Gemma, folder: Path
) -> None:
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for hf_name, (name, _, rows) in parts.items():
        if shards.shape(hf_name) != (expected := (rows, *shapes[name][1:])):
            raise WeightsMismatch(
                f"{hf_name} has shape {shards.shape(hf_name)}, config.json of {folder} makes it "
                f"{expected}; the files and the configuration are of different models"
            )
        shards.dtype(hf_name)


def _check_head(shards: Shards) -> None:
    """A written-out head must be the embedding, to which it is tied."""
    if _HEAD in shards.names and not torch.equal(
        shards.tensor(_HEAD), shards.tensor("model.embed_tokens.weight")
    ):
        raise WeightsMismatch(
            f"{_HEAD} differs from model.embed_tokens.weight; a Gemma ties them: the folder holds "
            "another model, or one whose head was tuned alone"
        )


def _common_dtype(shards: Shards, beside: frozenset[str]) -> torch.dtype:
    by_type: dict[torch.dtype, str] = {}
    for name in sorted(shards.names - beside):
        by_type.setdefault(shards.dtype(name), name)
    if len(by_type) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in by_type.items())
        raise WeightsMismatch(f"the files mix types ({found}); say which to cast to: dtype=...")
    return next(iter(by_type))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
