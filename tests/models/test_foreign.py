"""Models of other makers behind our protocol: the logits of transformers, packed or cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_gemma import hf_folder, hf_logits, random_rows, row_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import DataError, FolderError, WeightsMismatch
from cabochon.core.types import LinearPrediction
from cabochon.models.foreign import DensePrediction, ForeignModel, read_foreign, write_foreign

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2_tied_that_slides_above() -> Any:
    config = transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5,
        max_window_layers=1,
    )  # fmt: skip
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    return transformers.Qwen2ForCausalLM(config)


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=16))


def mistral_with_a_window() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=120, n_embd=48, n_layer=3, n_head=4, n_positions=64)
    )


def phi_with_a_biased_head() -> Any:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES | {"num_key_value_heads": 4}))


def granite_that_divides_its_logits() -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0))


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    return transformers.MambaForCausalLM(config)


MAKERS: list[Callable[[], Any]] = [
    llama, qwen2_tied_that_slides_above, qwen3, mistral_with_a_window, gpt2,
    phi_with_a_biased_head, granite_that_divides_its_logits,
]  # fmt: skip


def made(make: Callable[[], Any], folder: Path, **save: Any) -> Any:
    model = make().eval()
    generator = Key(9).fold(make.__name__).generator()
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.add_(drawn * (0.2 if weight.ndim == 1 else 1.0 / weight.shape[-1] ** 0.5))
    model.save_pretrained(folder, **save)
    return model


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("foreign")
    theirs = made(request.param, folder)
    return read_foreign(folder), theirs


def test_logits_are_those_of_transformers(pair) -> None:
    ours, theirs = pair
    (tokens,) = random_rows(20)
    torch.testing.assert_close(
        row_logits(ours, tokens), hf_logits(theirs, tokens), atol=1e-4, rtol=0
    )


def test_the_context_is_the_one_of_the_configuration(pair) -> None:
    assert pair[0].context == 64


def test_only_a_plain_head_is_kept_as_a_matrix(pair) -> None:
    ours, theirs = pair
    plain = not theirs.__class__.__name__.startswith(("Phi", "Granite"))
    prediction = ours(TokenBatch.of(random_rows(4)))
    assert isinstance(prediction, LinearPrediction if plain else DensePrediction)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(pair, left: bool) -> None:
    ours, theirs = pair
    rows = random_rows(16, 9, 1)
    batch = TokenBatch.of(rows, left=left, pad=5)
    out = ours(batch).logits(slice(None)).view(*batch.shape, -1)
    for row, tokens in enumerate(rows):
        held = out[row][batch.documents[row] >= 0]
        torch.testing.assert_close(held, hf_logits(theirs, tokens), atol=1e-4, rtol=0)


def test_packed_documents_never_see_each_other(pair) -> None:
    ours, theirs = pair
    first, second = random_rows(8, 12)
    documents = torch.tensor([0] * 8 + [1] * 12)[None]
    tokens = torch.cat([first, second])[None]
    batch = TokenBatch(
        tokens=tokens,
        positions=torch.cat([torch.arange(8), torch.arange(12)])[None],
        documents=documents,
        targets=tokens,
        mask=documents >= 0,
    )
    expected = torch.cat([hf_logits(theirs, first), hf_logits(theirs, second)])
    torch.testing.assert_close(ours(batch).logits(slice(None)), expected, atol=1e-4, rtol=0)


def test_cached_decoding_of_unequal_rows_is_the_full_forward(pair) -> None:
    ours, theirs = pair
    rows = random_rows(18, 9)
    prompts = [rows[0][:10], rows[1][:3]]
    cache = ours.new_cache(2, 18)
    batch = TokenBatch.of(prompts, left=True)
    out = ours(batch, cache).logits(slice(None)).view(2, 10, -1)
    seen: list[list[Tensor]] = [[out[0]], [out[1, 7:]]]
    for step in range(8):
        at = torch.tensor([[10 + step], [3 + step]])
        alive = torch.tensor([[0], [0 if 3 + step < 9 else -1]])
        tokens = torch.stack([rows[0][10 + step], rows[1][min(3 + step, 8)]])[:, None]
        batch = TokenBatch(
            tokens=tokens, positions=at, documents=alive, targets=tokens, mask=alive >= 0
        )
        out = ours(batch, cache).logits(slice(None))
        seen[0].append(out[:1])
        if alive[1] >= 0:
            seen[1].append(out[1:])
    for tokens, pieces in zip(rows, seen, strict=True):
        torch.testing.assert_close(torch.cat(pieces), hf_logits(theirs, tokens), atol=1e-4, rtol=0)


def test_chosen_rows_go_on_as_they_would_have(pair) -> None:
    ours, theirs = pair
    rows = random_rows(8, 6)
    cache = ours.new_cache(2, 10)
    ours(TokenBatch.of([row[:-1] for row in rows], left=True), cache)
    chosen = cache.select(torch.tensor([1, 1, 0]))
    tokens = torch.stack([rows[1][-1], rows[1][-1], rows[0][-1]])[:, None]
    at = torch.tensor([[5], [5], [7]])
    zeros = torch.zeros_like(at)
    batch = TokenBatch(
        tokens=tokens, positions=at, documents=zeros, targets=tokens, mask=zeros == 0
    )
    out = ours(batch, chosen).logits(slice(None))
    for row, logits in zip((1, 1, 0), out, strict=True):
        expected = hf_logits(theirs, rows[row])[-1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_tokens_that_were_taken_back_leave_neither_a_trace_nor_their_slots(pair) -> None:
    ours, theirs = pair
    right, wrong = random_rows(16, 40)
    cache = ours.new_cache(1, 40)
    ours(TokenBatch.of([right[:4]]), cache)
    for at in range(4, 16):
        tokens = torch.cat([right[at : at + 1], wrong[at + 1 : at + 5]])[None]
        zeros = torch.zeros_like(tokens)
        batch = TokenBatch(
            tokens=tokens, positions=torch.arange(at, at + 5)[None], documents=zeros,
            targets=tokens, mask=zeros == 0,
        )  # fmt: skip
        out = ours(batch, cache).logits(slice(0, 1))[0]
        expected = hf_logits(theirs, right[: at + 1])[-1]
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)
        cache.rewind([at + 1])
        assert cache.held.shape[1] <= 2 * (at + 1)


def test_a_row_that_begins_again_forgets_what_it_held(pair) -> None:
    ours, theirs = pair
    old, new = random_rows(7, 9)
    cache = ours.new_cache(1, 10)
    ours(TokenBatch.of([old]), cache)
    again = ours(TokenBatch.of([new]), cache).logits(slice(None))
    torch.testing.assert_close(again, hf_logits(theirs, new), atol=1e-4, rtol=0)


def test_saving_gives_the_same_tensors_back(pair, tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    write_foreign(ours, tmp_path / "ours")
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    second = load_file(tmp_path / "ours" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tokens,) = random_rows(6)
    assert torch.equal(
        row_logits(read_foreign(tmp_path / "ours"), tokens), row_logits(ours, tokens)
    )


@pytest.mark.parametrize(("before", "after"), [(20_000, 2**30), (2**30, 20_000), (20_000, 40_000)])
def test_a_save_over_an_earlier_one_leaves_the_new_weights_only(
    before: int, after: int, tmp_path: Path
) -> None:
    made(llama, tmp_path / "theirs")
    model = read_foreign(tmp_path / "theirs")
    write_foreign(model, tmp_path / "ours", max_shard_bytes=before)
    (tokens,) = random_rows(6)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)
    write_foreign(model, tmp_path / "ours", max_shard_bytes=after)
    assert torch.equal(
        row_logits(read_foreign(tmp_path / "ours"), tokens), row_logits(model, tokens)
    )
    write_foreign(model, tmp_path / "alone", max_shard_bytes=after)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()
    }


def test_shards_of_two_saves_of_a_foreign_model_are_refused(tmp_path: Path) -> None:
    model = ForeignModel(llama())
    write_foreign(model, tmp_path / "new", max_shard_bytes=20_000)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    write_foreign(model, tmp_path / "old", max_shard_bytes=20_000)
    name = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))[0]
    (tmp_path / "new" / name).replace(tmp_path / "old" / name)
    with pytest.raises(FolderError, match=r"are of different saves: a save .* was interrupted"):
        read_foreign(tmp_path / "old")


def test_a_foreign_model_learns(pair) -> None:
    ours, _ = pair
    batch = TokenBatch.of(random_rows(8, 5))
    ours(batch).logits(slice(None)).square().mean().backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    ours.zero_grad(set_to_none=True)


def test_our_gemma_and_the_foreign_reading_of_it_agree(tmp_path: Path) -> None:
    from cabochon.models.gemma import read_gemma

    hf_folder(tmp_path, "gemma2, some key heads")
    (tokens,) = random_rows(30)
    foreign = read_foreign(tmp_path)
    assert isinstance(foreign(TokenBatch.of([tokens])), LinearPrediction)
    torch.testing.assert_close(
        row_logits(foreign, tokens), row_logits(read_gemma(tmp_path), tokens), atol=1e-4, rtol=0
    )


def test_what_cannot_be_masked_is_refused_and_the_rest_is_exact(tmp_path: Path) -> None:
    theirs = made(mamba, tmp_path)
    ours = read_foreign(tmp_path)
    assert ours.context > 10**9
    rows = random_rows(9, 4)
    out = ours(TokenBatch.of(rows)).logits(slice(None)).view(2, 9, -1)
    torch.testing.assert_close(out[0], hf_logits(theirs, rows[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1, :4], hf_logits(theirs, rows[1]), atol=1e-4, rtol=0)
    with pytest.raises(DataError, match="MambaForCausalLM cannot be masked exactly"):
        ours(TokenBatch.of(rows, left=True))
    with pytest.raises(DataError, match="MambaForCausalLM cannot be masked exactly"):
        ours(TokenBatch.of(rows), ours.new_cache(2, 9))


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(K), f"lack {K}"),
        (lambda w: w.update(extra=torch.ones(2)), "hold, without a place for it, extra"),
        (lambda w: w.update({K: w[K][:-1]}), f"another shape.*{K}"),
        (lambda w: w.update({K: w[K].int()}), f"{K} in model.safetensors is of type I32"),
    ],
    ids=["missing", "surplus", "short", "integers"],
)
def test_a_wrong_tensor_is_named(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    made(llama, tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    change(values)
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsMismatch, match=message):
        read_foreign(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    made(llama, tmp_path, max_shard_size="40KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FolderError, match=f"lacks {victim.name}"):
        read_foreign(tmp_path)


def test_an_architecture_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    made(llama, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"llamma"'))
    with pytest.raises(FolderError, match="llamma"):
        read_foreign(tmp_path)


def test_wrapping_leaves_the_model_as_it_was() -> None:
    inner = mistral_with_a_window().train()
    ForeignModel(inner)
    assert inner.training
    assert inner.config.sliding_window == 5
