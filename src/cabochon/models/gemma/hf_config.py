"""A Gemma's shape in the words of a Hugging Face config.json, and back."""

from __future__ import annotations

from collections.abc import Mapping

from cabochon.core.errors import ConfigError
from cabochon.models.gemma.config import GemmaConfig

__all__ = ["config_from_hf", "config_to_hf"]

# What transformers takes for a key that config.json leaves out; older releases wrote only what
# differed from it.
_DEFAULTS: dict[str, dict[str, object]] = {
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "intermediate_size": 24576,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "intermediate_size": 9216, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip
_SHARED_DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_ACTIVATION = "gelu_pytorch_tanh"

# Keys that say how a model was made, stored, labelled or sampled from, and not what it computes.
_HARMLESS = frozenset({
    "architectures", "cabochon", "dtype", "torch_dtype", "transformers_version", "tokenizer_class",
    "initializer_range", "use_cache", "cache_implementation", "chunk_size_feed_forward",
    "is_decoder", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "output_attentions", "output_hidden_states", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "prefix", "sep_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "max_length",
    "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
})  # fmt: skip
_HARMLESS_BEGINNINGS = ("_", "unsloth_")


def config_from_hf(values: Mapping[str, object]) -> GemmaConfig:
    """The shape that a config.json of transformers 4 or 5 describes.

    A list of end-of-sequence ids is taken for its first. Keys that change nothing that is computed
    are left aside, and so is any key whose value is null, false, zero or empty.

    Raises:
        ConfigError: a model type, activation, rotary scaling, bias or layer pattern that this
            decoder does not compute, or a key that it does not know; the key is named.
    """
    kind = values.get("model_type")
    if kind not in _DEFAULTS:
        raise ConfigError(
            f"config.json has model_type {kind!r}; expected one of {', '.join(_DEFAULTS)} (other "
            "models are read through transformers: cabochon.models.foreign)"
        )
    given = {**_SHARED_DEFAULTS, **_DEFAULTS[str(kind)], **values}
    _refuse_what_is_not_computed(given)
    eos = given["eos_token_id"]
    if isinstance(eos, list) and eos:
        given["eos_token_id"] = eos[0]
    second = kind == "gemma2"
    return GemmaConfig(
        vocab_size=_whole(given, "vocab_size"),
        width=_whole(given, "hidden_size"),
        layers=_whole(given, "num_hidden_layers"),
        heads=_whole(given, "num_attention_heads"),
        kv_heads=_whole(given, "num_key_value_heads"),
        head_width=_whole(given, "head_dim"),
        ffn_width=_whole(given, "intermediate_size"),
        query_scalar=_whole(given, "query_pre_attn_scalar" if second else "head_dim"),
        window=_window(given) if second else None,
        attention_cap=_real_or_none(given, "attn_logit_softcapping") if second else None,
        final_cap=_real_or_none(given, "final_logit_softcapping") if second else None,
        post_norms=second,
        rope_base=_rope_base(given),
        norm_eps=_real(given, "rms_norm_eps"),
        context=_whole(given, "max_position_embeddings"),
        pad_id=None if given["pad_token_id"] is None else _whole(given, "pad_token_id"),
        eos_id=_whole(given, "eos_token_id"),
        bos_id=_whole(given, "bos_token_id"),
    )


def config_to_hf(config: GemmaConfig) -> dict[str, object]:
    """What config.json says of this shape, for transformers 4 and 5 alike."""
    values: dict[str, object] = {
        "architectures": ["Gemma2ForCausalLM" if config.post_norms else "GemmaForCausalLM"],
        "model_type": "gemma2" if config.post_norms else "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "bos_token_id": config.bos_id,
    }
    if not config.post_norms:
        return {**values, "hidden_act": _ACTIVATION, "hidden_activation": _ACTIVATION}
    types = ["sliding_attention" if window else "full_attention" for window in config.layer_windows]
    return {
        **values,
        "hidden_activation": _ACTIVATION,
        "query_pre_attn_scalar": config.query_scalar,
        # transformers wants a number even where no layer slides.
        "sliding_window": config.window or config.context,
        "layer_types": types,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
    }


def _refuse_what_is_not_computed(given: Mapping[str, object]) -> None:
    # Gemma 1 was published as "gelu" and always meant the tanh form.
    legacy = ("gelu",) if given["model_type"] == "gemma" else ()
    wanted: dict[str, tuple[object, ...]] = {
        "hidden_act": (None, *legacy, _ACTIVATION),
        "hidden_activation": (None, _ACTIVATION),
        "attention_bias": (None, False),
        "attention_dropout": (None, 0, 0.0),
        "tie_word_embeddings": (None, True),
        "use_bidirectional_attention": (None, False),
        "rope_scaling": (None,),
        "quantization_config": (None,),
    }
    for key, allowed in wanted.items():
        if given.get(key) not in allowed:
            raise ConfigError(
                f"config.json has {key} = {given[key]!r}; this decoder computes only "
                f"{allowed[-1]!r}: read the folder through cabochon.models.foreign instead"
            )
    known = {"model_type", "rope_theta", "rope_parameters", *wanted, *_SHARED_DEFAULTS}
    known |= _DEFAULTS[str(given["model_type"])].keys() | _HARMLESS
    if given["model_type"] == "gemma2":
        known |= {"layer_types"}
        if given.get("sliding_window_size") == given["sliding_window"]:
            known |= {"sliding_window_size"}  # beside the other in the first published files
    for key, value in given.items():
        if value and key not in known and not key.startswith(_HARMLESS_BEGINNINGS):
            raise ConfigError(
                f"config.json has {key} = {value!r}, which this decoder does not know: take the "
                "key out if it changes nothing that the model computes, or read the folder "
                "through cabochon.models.foreign"
            )


def _rope_base(given: Mapping[str, object]) -> float:
    rope = given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json has rope_parameters = {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"config.json asks for {kind!r} rotary positions; this decoder computes "
            "only 'default': read the folder through cabochon.models.foreign instead"
        )
    for key, value in rope.items():
        if value and key not in ("rope_type", "type", "rope_theta"):
            raise ConfigError(
                f"config.json has rope_parameters.{key} = {value!r}; this decoder turns every "
                "layer's whole heads by the one rope_theta: read the folder through "
                "cabochon.models.foreign instead"
            )
    # Where both are given transformers takes the newer form.
    return _real({"rope_theta": 10000.0, **given, **rope}, "rope_theta")


def _window(given: Mapping[str, object]) -> int | None:
    layers = _whole(given, "num_hidden_layers")
    types = given.get("layer_types")
    if types is not None and not _lists_layers(types, layers, "full_attention", "full_attention"):
        if not _lists_layers(types, layers, "sliding_attention", "full_attention"):
            raise ConfigError(
                f"config.json has layer_types {types!r}; this decoder knows sliding layers at even "
                "indices and full ones at odd, or full ones alone, one for each of its "
                f"{layers} layers"
            )
    elif types is not None:
        return None
    return None if given["sliding_window"] is None else _whole(given, "sliding_window")


def _lists_layers(types: object, layers: int, even: str, odd: str) -> bool:
    """Compares in the order of the list: the number of layers may be any that a file claims."""
    if not isinstance(types, list) or len(types) != layers:
        return False
    return all(kind == (odd if index % 2 else even) for index, kind in enumerate(types))


def _whole(given: Mapping[str, object], key: str) -> int:
    value = given[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json has {key} = {value!r}; expected a whole number")
    return value


def _real(given: Mapping[str, object], key: str) -> float:
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json has {key} = {value!r}; expected a number")
    return float(value)


def _real_or_none(given: Mapping[str, object], key: str) -> float | None:
    return None if given[key] is None else _real(given, key)
