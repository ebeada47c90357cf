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


def config_from_hf(values: Mapping[str, object]) -> GemmaConfig:
    """The shape that a config.json of transformers 4 or 5 describes.

    A list of end-of-sequence ids is taken for its first.

    Raises:
        ConfigError: a model type, activation, rotary scaling, bias or layer pattern that this
            decoder does not compute.
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


def _rope_base(given: Mapping[str, object]) -> float:
    rope = given.get("rope_parameters")
    if not isinstance(rope, dict):
        return _real({"rope_theta": 10000.0, **given}, "rope_theta")
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"config.json asks for {rope['rope_type']!r} rotary positions; this decoder computes "
            "only 'default': read the folder through cabochon.models.foreign instead"
        )
    return _real({"rope_theta": 10000.0, **rope}, "rope_theta")


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
