"""Hugging Face folders: the same bits there and back, and errors that name what is wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_gemma import SHAPES, hf_folder, hf_gemma, hf_logits, random_rows, row_logits
from safetensors.torch import load_file, save_file

from cabochon.core import Key
from cabochon.core.errors import CabochonError, ConfigError, FolderError, WeightsMismatch
from cabochon.models.gemma import Gemma, preset, read_gemma, write_gemma
from cabochon.models.gemma.hf_config import config_from_hf

pytest.importorskip("transformers")

SOME = "gemma2, some key heads"
WEIGHTS = "model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf_folder(tmp_path / "theirs", name, dtype)
    model = read_gemma(tmp_path / "theirs")
    assert model.embedding.dtype is dtype
    write_gemma(model, tmp_path / "ours")
    assert same(tensors(tmp_path / "theirs"), tensors(tmp_path / "ours"))
    assert read_gemma(tmp_path / "ours").config == model.config


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_folder(tmp_path / "theirs", name)
    model = read_gemma(tmp_path / "theirs")
    write_gemma(model, tmp_path / "ours", max_shard_bytes=20_000)
    theirs, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values())
    (tokens,) = random_rows(30)
    torch.testing.assert_close(
        row_logits(model, tokens), hf_logits(theirs, tokens), atol=1e-4, rtol=0
    )
    theirs.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "theirs"))


def test_a_configuration_of_transformers_4_is_read(tmp_path: Path) -> None:
    hf_folder(tmp_path, "gemma2, other base")
    expected = read_gemma(tmp_path).config
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"], values["layer_types"]
    values |= {"rope_theta": 500.0, "torch_dtype": "float32", "cache_implementation": "hybrid"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_gemma(tmp_path).config == expected


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    hf_folder(tmp_path / "theirs", SOME, max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model = read_gemma(tmp_path / "theirs")
    write_gemma(model, tmp_path / "ours", max_shard_bytes=50_000)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 52_000 for path in files)
    assert same(tensors(tmp_path / "theirs"), tensors(tmp_path / "ours"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in model.parameters())


def test_saving_again_leaves_nothing_of_the_save_before(tmp_path: Path) -> None:
    model = Gemma.init(preset("gemma2-nano"), Key(0))
    write_gemma(model, tmp_path, max_shard_bytes=100_000)
    write_gemma(model, tmp_path, max_shard_bytes=200_000)
    read_gemma(tmp_path)
    write_gemma(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    write_gemma(model, tmp_path, max_shard_bytes=200_000)
    assert WEIGHTS not in {path.name for path in tmp_path.iterdir()}
    read_gemma(tmp_path)


def test_a_cast_happens_only_on_request(tmp_path: Path) -> None:
    hf_folder(tmp_path, SOME, torch.bfloat16)
    assert read_gemma(tmp_path).embedding.dtype is torch.bfloat16
    wide = read_gemma(tmp_path, torch.float32)
    stored = tensors(tmp_path)["model.embed_tokens.weight"]
    assert torch.equal(wide.embedding, stored.float())
    values = tensors(tmp_path)
    values["model.norm.weight"] = values["model.norm.weight"].float()
    save_file(values, tmp_path / WEIGHTS)
    with pytest.raises(WeightsMismatch, match=r"mix types .*model\.norm\.weight is torch\.float32"):
        read_gemma(tmp_path)
    assert read_gemma(tmp_path, torch.float32).final_norm.dtype is torch.float32


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(K), f"lack {K}"),
        (lambda w: w.update({K + "s": w.pop(K)}), rf"lack {K} \(is {K}s meant\?\)"),
        (lambda w: w.update(extra=torch.ones(2)), "hold extra, which"),
        (lambda w: w.update({K: w[K][:-1]}), rf"{K} has shape \(39, 48\), .* \(40, 48\)"),
        (lambda w: w.update({K: w[K].T.contiguous()}), rf"{K} has shape \(48, 40\)"),
        (lambda w: w.update({K: w[K].int()}), f"{K} in {WEIGHTS} is of type I32"),
        (lambda w: w.update({"lm_head.weight": w[K] * 2}), "lm_head.weight differs"),
    ],
    ids=["missing", "renamed", "surplus", "short", "turned", "integers", "head"],
)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, Any]], object],
    message: str,
    dtype: torch.dtype | None,
    tmp_path: Path,
) -> None:
    hf_folder(tmp_path, SOME)
    values = tensors(tmp_path)
    change(values)
    save_file(values, tmp_path / WEIGHTS)
    with pytest.raises(WeightsMismatch, match=message):
        read_gemma(tmp_path, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 10**12}, r"gate_proj\.weight has shape \(80, 48\), .*1000000000000"),
        ({"vocab_size": 10**12}, r"embed_tokens\.weight has shape \(120, 48\), .*1000000000000"),
        ({"intermediate_size": 10**18}, "larger than any can be"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "1000000000000 layers, the files"),
    ],
)
def test_a_configuration_of_any_size_costs_no_memory(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    hf_folder(tmp_path, SOME)
    values = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsMismatch, match=message):
        read_gemma(tmp_path)


def test_a_written_out_tied_head_is_read(tmp_path: Path) -> None:
    hf_folder(tmp_path, SOME)
    values = tensors(tmp_path)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, tmp_path / WEIGHTS)
    read_gemma(tmp_path)


def two_saves(folder: Path) -> tuple[Path, Path]:
    """The same shapes in as many files, with other weights."""
    model = Gemma.init(preset("gemma2-nano"), Key(0))
    write_gemma(model, folder / "old", max_shard_bytes=200_000)
    with torch.no_grad():
        model.embedding.mul_(2.0)
    write_gemma(model, folder / "new", max_shard_bytes=200_000)
    return folder / "old", folder / "new"


def test_an_interrupted_save_over_another_is_refused_not_mixed(tmp_path: Path) -> None:
    old, new = two_saves(tmp_path)
    names = sorted(path.name for path in new.glob("*.safetensors"))
    assert len(names) > 1
    for name in names[:-1]:
        (new / name).replace(old / name)
        with pytest.raises(FolderError, match=r"are of different saves: a save .* was interrupted"):
            read_gemma(old)
    (new / names[-1]).replace(old / names[-1])
    read_gemma(old)


def test_a_shard_of_ours_among_those_of_transformers_is_refused(tmp_path: Path) -> None:
    hf_folder(tmp_path / "theirs", SOME, max_shard_size="40KB")
    write_gemma(read_gemma(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=40_000)
    name = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))[0]
    values = load_file(tmp_path / "theirs" / name)
    save_file(values, tmp_path / "theirs" / name, metadata={"format": "pt", "save": "another"})
    with pytest.raises(FolderError, match="are of different saves"):
        read_gemma(tmp_path / "theirs")


def test_the_same_model_saved_twice_is_the_same_bytes(tmp_path: Path) -> None:
    model = Gemma.init(preset("gemma2-nano"), Key(0))
    for name in ("one", "two"):
        write_gemma(model, tmp_path / name, max_shard_bytes=200_000)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_one_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    old, _ = two_saves(tmp_path)
    write_gemma(read_gemma(old), tmp_path / "single")
    (tmp_path / "single" / WEIGHTS).replace(old / WEIGHTS)
    with pytest.raises(FolderError, match="two saves are mixed, or one was interrupted"):
        read_gemma(old)
    index = old / "model.safetensors.index.json"
    where = dict.fromkeys(load_file(old / WEIGHTS), WEIGHTS)
    index.write_text(json.dumps({"weight_map": where}))
    read_gemma(old)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hf_folder(tmp_path, SOME, max_shard_size="40KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FolderError, match=f"lacks {victim.name} of the"):
        read_gemma(tmp_path)


def test_an_index_that_the_files_contradict_is_refused(tmp_path: Path) -> None:
    hf_folder(tmp_path, SOME, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = sorted(set(values["weight_map"].values()))
    wrong = next(file for file in files if file != values["weight_map"][K])
    values["weight_map"][K] = wrong
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsMismatch, match=f"{wrong} holds {K}"):
        read_gemma(tmp_path)
    values["weight_map"][K] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(FolderError, match="expected a file name in that folder"):
        read_gemma(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_a_file_cut_short_is_named(keep: int, tmp_path: Path) -> None:
    hf_folder(tmp_path, SOME)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(FolderError, match=r"model\.safetensors cannot be read as safetensors"):
        read_gemma(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"config\.json does not exist"):
        read_gemma(tmp_path / "nowhere")
    hf_folder(tmp_path, SOME)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FolderError, match=r"neither .*pytorch_model\.bin is pickle, which is never"
    ):
        read_gemma(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FolderError, match=r"config\.json is not JSON"):
        read_gemma(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; expected one of gemma, gemma2"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' rotary positions"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1e4}}, "'yarn' rotary positions"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default'; expected an object"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters.sliding_attention",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, which this decoder does"),
        ({"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"sliding_window_size": 7}, "sliding_window_size = 7"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "even"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_size": "48"}, "hidden_size = '48'; expected a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'; expected a number"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    hf_gemma(SOME).config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CabochonError, match=message) as caught:
        read_gemma(tmp_path)
    assert isinstance(caught.value, ConfigError)


PUBLISHED = {
    "_name_or_path": "google/gemma-2-2b-it", "architectures": ["Gemma2ForCausalLM"],
    "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2", "use_cache": True, "unsloth_version": "2024.9",
    "_attn_implementation": "eager", "temperature": 0.7, "pretraining_tp": 0,
    "id2label": {"0": "A"}, "rope_theta": 10000.0, "final_touch": None, "decoupled": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PUBLISHED,
        {"rope_parameters": None, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10000.0},
        {"sliding_window_size": 4},
    ],
)
def test_what_transformers_writes_beside_the_shape_changes_nothing(
    changes: dict[str, object], tmp_path: Path
) -> None:
    theirs = hf_folder(tmp_path, SOME)
    expected = read_gemma(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if "sliding_window_size" in changes:
        changes = {"sliding_window_size": values["sliding_window"]}
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    found = read_gemma(tmp_path)
    assert found.config == expected.config
    (tokens,) = random_rows(30)
    torch.testing.assert_close(
        row_logits(found, tokens), hf_logits(theirs, tokens), atol=1e-4, rtol=0
    )


def test_the_base_of_the_rotation_is_read_in_its_old_and_its_new_place(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hf_folder(tmp_path, SOME)
    values = json.loads((tmp_path / "config.json").read_text())
    for changes in (
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_theta"] == read_gemma(tmp_path).config.rope_base == 5e5


@pytest.mark.parametrize("kind", ["GemmaConfig", "Gemma2Config"])
def test_the_configuration_that_transformers_writes_by_default_is_read(
    kind: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    config = config_from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == replace(
        preset("gemma-7b" if kind == "GemmaConfig" else "gemma2-2b"), context=config.context
    )


def test_what_only_a_gemma_2_has_is_refused_of_a_gemma_1(tmp_path: Path) -> None:
    from transformers import GemmaConfig

    GemmaConfig().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match="attn_logit_softcapping = 50"):
        config_from_hf(values | {"attn_logit_softcapping": 50.0})


def test_a_model_that_slides_nowhere_is_written_as_such(tmp_path: Path) -> None:
    model = Gemma.init(replace(preset("gemma2-nano"), window=None), Key(0))
    write_gemma(model, tmp_path)
    assert read_gemma(tmp_path).config.window is None


def test_a_full_disk_leaves_the_earlier_save(tmp_path: Path) -> None:
    model = Gemma.init(preset("gemma2-nano"), Key(0))
    write_gemma(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(FolderError, match="could not be written"):
            write_gemma(
                Gemma.init(preset("gemma2-nano"), Key(1)), tmp_path, max_shard_bytes=200_000
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
