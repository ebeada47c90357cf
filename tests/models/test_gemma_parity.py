"""The decoder against transformers' eager Gemma and Gemma2, and against itself in other forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_gemma import SHAPES, hf_folder, hf_logits, random_rows, row_logits
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.models.gemma import (
    PRESETS,
    Gemma,
    GemmaConfig,
    parameter_counts,
    preset,
    read_gemma,
)

CLOSE = 1e-4
"""Logits in float32."""


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    theirs = hf_folder(folder, request.param)
    return read_gemma(folder), theirs


def test_logits_are_those_of_transformers_past_the_window(pair) -> None:
    ours, theirs = pair
    (tokens,) = random_rows(30)
    expected = hf_logits(theirs, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(row_logits(ours, tokens), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_changes_nothing(pair, left: bool) -> None:
    ours, theirs = pair
    rows = random_rows(25, 11, 1)
    batch = TokenBatch.of(rows, pad=77, left=left)
    out = ours(batch).logits(slice(None)).view(*batch.shape, -1)
    assert out.isfinite().all()
    for row, tokens in enumerate(rows):
        held = out[row][batch.documents[row] >= 0]
        torch.testing.assert_close(held, hf_logits(theirs, tokens), atol=CLOSE, rtol=0)


def packed(rows: list[Tensor]) -> TokenBatch:
    """All rows one after the other in one, with a little padding between and behind."""
    tokens = torch.cat([torch.cat([row, torch.tensor([0])]) for row in rows])[None]
    positions = torch.cat([torch.cat([torch.arange(len(r)), torch.tensor([0])]) for r in rows])
    documents = torch.cat([torch.tensor([i] * len(r) + [-1]) for i, r in enumerate(rows)])
    return TokenBatch(
        tokens=tokens,
        positions=positions[None],
        documents=documents[None],
        targets=tokens,
        mask=documents[None] >= 0,
    )


def test_packed_documents_never_see_each_other(pair) -> None:
    ours, theirs = pair
    rows = random_rows(13, 4, 19)
    out = ours(packed(rows)).logits(slice(None))
    start = 0
    for tokens in rows:
        expected = hf_logits(theirs, tokens)
        torch.testing.assert_close(out[start : start + len(tokens)], expected, atol=CLOSE, rtol=0)
        start += len(tokens) + 1


def test_gradients_do_not_cross_documents(pair) -> None:
    ours, _ = pair
    batch = packed(random_rows(7, 5))
    hidden = ours(batch).hidden
    (gradient,) = torch.autograd.grad(hidden[0, 8:13].square().sum(), ours.embedding)
    outside = set(batch.tokens[0, :8].tolist()) - set(batch.tokens[0, 8:13].tolist())
    assert gradient[sorted(outside)].abs().max() == 0
    assert gradient[batch.tokens[0, 8]].abs().max() > 0


SLIDING = [name for name in SHAPES if name.startswith("gemma2") and "no window" not in name]


@pytest.mark.parametrize("pair", SLIDING, indirect=True)
def test_the_window_can_be_changed_at_inference(pair) -> None:
    ours, theirs = pair
    theirs.config.sliding_window = 3
    (tokens,) = random_rows(30)
    narrow = ours.with_window(3)
    try:
        expected = hf_logits(theirs, tokens)
    finally:
        theirs.config.sliding_window = 6
    torch.testing.assert_close(row_logits(narrow, tokens), expected, atol=CLOSE, rtol=0)
    assert narrow.embedding is ours.embedding
    assert ours.config.window == 6


@pytest.fixture
def gemma(tmp_path: Path) -> Gemma:
    pytest.importorskip("transformers")
    hf_folder(tmp_path, "gemma2, some key heads")
    return read_gemma(tmp_path)


def test_a_window_as_long_as_the_text_is_no_window(gemma: Gemma) -> None:
    (tokens,) = random_rows(20)
    wide, none = gemma.with_window(20), gemma.with_window(None)
    torch.testing.assert_close(row_logits(wide, tokens), row_logits(none, tokens))


def test_with_a_window_of_one_the_sliding_layer_sees_the_token_itself(gemma: Gemma) -> None:
    config = replace(gemma.config, layers=1, window=1)
    alone = Gemma.init(config, Key(0))
    tokens = random_rows(9)[0]
    # Without neighbours and with rotations that cancel, a token's place makes no difference.
    singles = torch.cat([row_logits(alone, token[None]) for token in tokens])
    torch.testing.assert_close(row_logits(alone, tokens), singles, atol=1e-6, rtol=0)


def test_caps_bound_the_logits_and_vanish_as_they_grow(gemma: Gemma) -> None:
    (tokens,) = random_rows(20)
    with torch.no_grad():
        gemma.embedding.mul_(1000.0)
    assert row_logits(gemma, tokens).abs().max() <= 2.0
    gemma.final_norm.grad = None
    row_logits(gemma, tokens).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in gemma.parameters())
    with torch.no_grad():
        gemma.embedding.mul_(0.001)
    uncapped = other(gemma, attention_cap=None, final_cap=None)
    high = other(gemma, attention_cap=1e4, final_cap=1e4)
    torch.testing.assert_close(
        row_logits(high, tokens), row_logits(uncapped, tokens), atol=CLOSE, rtol=0
    )
    assert (row_logits(gemma, tokens) - row_logits(uncapped, tokens)).abs().max() > 0.1


def other(model: Gemma, **changes: object) -> Gemma:
    """The same weights under a changed configuration."""
    changed = Gemma(replace(model.config, **changes))
    changed.load_state_dict(model.state_dict())
    return changed


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_full_heads_that_share_their_keys(gemma: Gemma, kv_heads: int) -> None:
    config = replace(gemma.config, kv_heads=kv_heads)
    grouped = Gemma.init(config, Key(1))
    full = Gemma(replace(config, kv_heads=config.heads))
    weights = grouped.state_dict()
    query, key = config.heads * config.head_width, kv_heads * config.head_width
    for name in [name for name in weights if name.endswith("qkv")]:
        q, k, v = weights[name].split([query, key, key])
        k, v = (
            part.unflatten(0, (kv_heads, -1))
            .repeat_interleave(config.heads // kv_heads, 0)
            .flatten(0, 1)
            for part in (k, v)
        )
        weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    (tokens,) = random_rows(15)
    torch.testing.assert_close(
        row_logits(grouped, tokens), row_logits(full, tokens), atol=1e-6, rtol=0
    )


PUBLISHED = {
    "gemma-2b": (524_550_144, 1_981_884_416),
    "gemma-7b": (786_825_216, 7_751_248_896),
    "gemma2-2b": (590_118_912, 2_024_517_888),
    "gemma2-9b": (917_962_752, 8_324_201_984),
    "gemma2-27b": (1_180_237_824, 26_047_480_320),
}
"""Gemma report table 2, Gemma 2 report table 1: embedding of 256128 rows, and the rest."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_published_sizes(name: str) -> None:
    config = replace(preset(name), vocab_size=256128)
    assert parameter_counts(config) == PUBLISHED[name]
    model = Gemma(config, device="meta")
    total = sum(weight.numel() for weight in model.parameters())
    assert (model.embedding.numel(), total - model.embedding.numel()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_what_is_built(name: str) -> None:
    model = Gemma(preset(name), device="meta")
    assert sum(parameter_counts(model.config)) == sum(w.numel() for w in model.parameters())


def test_initial_weights_depend_on_the_key_alone() -> None:
    config = preset("gemma2-nano")
    first, again = Gemma.init(config, Key(3)), Gemma.init(config, Key(3))
    half, shorter = Gemma.init(config, Key(3), torch.bfloat16), replace(config, layers=1)
    for (name, weight), same, rounded in zip(
        first.named_parameters(), again.parameters(), half.parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        assert torch.equal(weight.bfloat16(), rounded), name
        expected = 0.0 if weight.ndim == 1 else 0.02
        assert abs(weight.std().item() - expected) < 1e-3, name
    assert torch.equal(Gemma.init(shorter, Key(3)).blocks[0].qkv, first.blocks[0].qkv)
    assert not torch.equal(Gemma.init(config, Key(4)).embedding, first.embedding)


def test_recomputing_activations_gives_the_same_gradients(gemma: Gemma) -> None:
    batch = TokenBatch.of(random_rows(30, 17))
    gradients = []
    for again in (False, True):
        gemma.checkpoint_activations = again
        gemma.zero_grad()
        gemma(batch).logits(slice(None)).square().mean().backward()
        gradients.append([weight.grad.clone() for weight in gemma.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def saved_bytes(model: Gemma, batch: TokenBatch) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out."""
    kept: dict[int, int] = {}
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(batch).hidden
    hidden.sum().backward()
    return sum(kept.values())


def test_recomputing_activations_keeps_far_less() -> None:
    model = Gemma.init(replace(preset("gemma2-micro"), vocab_size=64), Key(0))
    batch = TokenBatch.of(random_rows(64, 64, vocab=64))
    plain = saved_bytes(model, batch)
    model.checkpoint_activations = True
    assert saved_bytes(model, batch) < 0.25 * plain


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no preset 'gemma2-9'; nearest: gemma2-9b"):
        preset("gemma2-9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads, got 4 and 3"),
        ({"head_width": 31}, "even"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"width": 2.0}, "width must be a whole number"),
        ({"window": 0}, "window must be above 0"),
        ({"final_cap": -1.0}, "final_cap must be above 0"),
        ({"bos_id": 4096}, "bos_id must lie in the vocabulary"),
        ({"width": 130}, "width must be a multiple of heads"),
        ({"post_norms": False}, "window, attention_cap, final_cap set without post_norms"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(preset("gemma2-micro"), **changes)


def test_a_gemma_1_scales_by_its_head_width() -> None:
    with pytest.raises(ConfigError, match="query_scalar 7 without post_norms"):
        replace(preset("gemma-nano"), query_scalar=7)


def test_configurations_are_values() -> None:
    assert isinstance(preset("gemma2-nano"), GemmaConfig)
    assert preset("gemma2-nano") == replace(preset("gemma2-nano"))
    assert preset("gemma2-2b").layer_windows[:3] == (4096, None, 4096)
    assert set(preset("gemma-2b").layer_windows) == {None}
