"""Kernels written by hand against the same mathematics left to autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from cabochon.models.gemma.cuda_attention import cuda_attention, flex_parts, plain_attention
from cabochon.models.gemma.kernels import (
    Visibility,
    attention,
    attention_cached,
    geglu,
    geglu_linear,
    norm_linear,
    rms_norm,
    rope,
    rotated_attention,
)

EXACT = 1e-10  # float64
HALF = 0.015  # bfloat16: of the norm of the result, whose own rounding is 2^-9


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def plain_geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1))
    turned = turned * torch.complex(cos, sin)[:, :, None]
    return torch.cat([turned.real, turned.imag], -1)


def angles(rows: int, length: int, head_width: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(rows, length, head_width // 2, dtype=torch.float64)
    return angle.cos(), angle.sin()


def packed(*rows: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Documents and positions of rows that hold documents of these lengths, padded at the end."""
    documents = torch.full((len(rows), length), -1)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        start = 0
        for document, size in enumerate(lengths):
            documents[row, start : start + size] = document
            positions[row, start : start + size] = torch.arange(size)
            start += size
    return documents, positions


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], close: float) -> None:
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=close)


def value_and_gradients(value: Tensor, leaves: tuple[Tensor, ...], seed: int = 1) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return value, *torch.autograd.grad(value, leaves, weights)


def test_norm_and_gate_and_rotation_equal_autograd_in_float64() -> None:
    x, weight, matrix = wide(3, 5, 8), wide(8), wide(4, 8)
    cases = [
        (rms_norm(x, weight, 1e-6), plain_rms_norm(x, weight, 1e-6), (x, weight)),
        (geglu(x), plain_geglu(x), (x,)),
        (
            norm_linear(x, weight, matrix, 1e-6),
            plain_rms_norm(x, weight, 1e-6) @ matrix.T,
            (x, weight, matrix),
        ),
    ]
    down = wide(6, 4)
    cases.append((geglu_linear(x, down), plain_geglu(x) @ down.T, (x, down)))
    heads, (cos, sin) = wide(3, 5, 2, 6), angles(3, 5, 6)
    cases.append((rope(heads, cos, sin), plain_rope(heads, cos, sin), (heads,)))
    for found, wanted, leaves in cases:
        assert_same(value_and_gradients(found, leaves), value_and_gradients(wanted, leaves), EXACT)


def test_the_gate_is_the_tanh_approximation_of_gelu() -> None:
    gate_up = torch.randn(4, 6)
    gate, up = gate_up.chunk(2, -1)
    torch.testing.assert_close(geglu(gate_up), gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_rows_at_all_give_no_rows_and_gradients_of_zero(shape: tuple[int, ...]) -> None:
    x = torch.zeros(*shape, 8, requires_grad=True)
    norm, up, down = (torch.ones(sizes, requires_grad=True) for sizes in [(8,), (12, 8), (8, 6)])
    out = geglu_linear(norm_linear(x, norm, up, 1e-6), down)
    alone = rms_norm(geglu(x), norm[:4], 1e-6)
    assert out.shape == x.shape
    assert alone.shape == (*shape, 4)
    (out.sum() + alone.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not any(w.grad.any() for w in (norm, up, down))


def test_gradients_agree_with_finite_differences() -> None:
    x, weight, matrix, down = wide(2, 3, 4), wide(4), wide(3, 4), wide(3, 2)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: norm_linear(*a, 1e-6), (x, weight, matrix))
    assert torch.autograd.gradcheck(geglu, (x,))
    assert torch.autograd.gradcheck(geglu_linear, (x, down))
    documents, positions = packed([3, 2], [4], length=5)
    visibility = Visibility(documents, positions, 3)
    cos, sin = angles(2, 5, 4)
    assert torch.autograd.gradcheck(
        lambda qkv: rotated_attention(qkv, cos, sin, visibility, heads=2, scale=0.6, cap=2.0),
        (wide(2, 5, 4, 4),),
    )


def test_many_blocks_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = wide(7, 12), wide(3, 6)
    once = value_and_gradients(geglu_linear(gate_up, down), (gate_up, down))
    x, norm, matrix = wide(7, 8), wide(8), wide(3, 8)
    leaves = x, norm, matrix
    normed = value_and_gradients(norm_linear(*leaves, 1e-6), leaves)
    for name, elements in (("_BLOCK_ELEMENTS", 16), ("_PRODUCT_ELEMENTS", 30)):
        monkeypatch.setattr(f"cabochon.models.gemma.kernels.{name}", {"cpu": elements})
    assert_same(value_and_gradients(geglu_linear(gate_up, down), (gate_up, down)), once, 1e-12)
    assert_same(value_and_gradients(norm_linear(*leaves, 1e-6), leaves), normed, 1e-12)


@given(
    heads=st.sampled_from([(4, 1), (4, 2), (3, 3)]),
    cap=st.sampled_from([None, 1.5, 50.0, 1e3]),
    window=st.sampled_from([None, 1, 4, 9, 100]),
    layout=st.sampled_from(
        [([20], [20]), ([7, 13], [20]), ([5, 1, 8], [3]), ([1] * 20, [19]), ([], [6, 6])]
    ),
    queries=st.sampled_from([3, 8, 128]),
    tile=st.sampled_from([8, 500, 2**18]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_attention_equals_autograd_in_float64_however_it_is_tiled(
    heads: tuple[int, int],
    cap: float | None,
    window: int | None,
    layout: tuple[list[int], ...],
    queries: int,
    tile: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    length, head_width = 20, 6
    documents, positions = packed(*layout, length=length)
    qkv = wide(len(layout), length, heads[0] + 2 * heads[1], head_width)
    cos, sin = angles(len(layout), length, head_width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cabochon.models.gemma.visibility._QUERIES", queries)
        patch.setattr("cabochon.models.gemma.visibility._TILE_ELEMENTS", tile)
        patch.setattr("cabochon.models.gemma.visibility._KEPT_ELEMENTS", tile)
        visibility = Visibility(documents, positions, window)
        found = rotated_attention(qkv, cos, sin, visibility, heads=heads[0], scale=0.7, cap=cap)
        found = value_and_gradients(found, (qkv,))
        q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        apart = attention(
            q, k, v, documents=documents, positions=positions, scale=0.7, cap=cap, window=window
        )
        apart = value_and_gradients(apart, (qkv,))
    q, k, v = qkv.split([heads[0], heads[1], heads[1]], dim=2)
    q, k = plain_rope(q, cos, sin), plain_rope(k, cos, sin)
    wanted = plain_attention(q, k, v, visibility, scale=0.7, cap=cap)
    wanted = value_and_gradients(wanted, (qkv,))
    assert all(value.isfinite().all() for value in found)
    assert_same(found, wanted, EXACT)
    assert_same(apart, wanted, EXACT)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visibility_is_same_document_not_after_and_within_the_window(window: int | None) -> None:
    documents, positions = packed([4, 2], [5], length=7)
    visible = Visibility(documents, positions, window).visible()
    for row in range(2):
        for query in range(7):
            for key in range(7):
                back = int(positions[row, query] - positions[row, key])
                expected = bool(documents[row, query] == documents[row, key]) and back >= 0
                expected = expected and (window is None or back < window)
                assert visible[row, query, key] == expected


def test_tiles_skip_keys_outside_the_window_and_after_the_queries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cabochon.models.gemma.visibility._QUERIES", 128)
    documents, positions = packed([512], length=512)
    whole = Visibility(documents, positions, None).tiles(1, 1)
    assert [(tile.keys.start, tile.keys.stop) for tile in whole] == [
        (0, 128), (0, 256), (0, 384), (0, 512),
    ]  # fmt: skip
    local = Visibility(documents, positions, 64).tiles(1, 1)
    assert [(tile.keys.start, tile.keys.stop) for tile in local] == [
        (0, 128), (65, 256), (193, 384), (321, 512),
    ]  # fmt: skip


def test_a_window_of_one_gives_every_token_its_own_value() -> None:
    documents, positions = packed([6], [2, 3], length=6)
    q, k, v = wide(2, 6, 2, 4), wide(2, 6, 1, 4), wide(2, 6, 1, 4)
    mixed = attention(
        q, k, v, documents=documents, positions=positions, scale=1.0, cap=3.0, window=1
    )
    # Row 1 ends in one token of padding, which sees only itself as well.
    torch.testing.assert_close(mixed, v.expand(2, 6, 2, 4))


def test_later_tokens_and_other_documents_change_nothing() -> None:
    documents, positions = packed([5, 4], length=9)
    q, k, v = wide(1, 9, 2, 4), wide(1, 9, 2, 4), wide(1, 9, 2, 4)

    def mix(k: Tensor, v: Tensor) -> Tensor:
        return attention(
            q, k, v, documents=documents, positions=positions, scale=0.5, cap=20.0, window=None
        )

    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[0, 7:] += 1e3
    changed_v[0, 7:] += 1e3
    changed_k[0, :5] -= 1e3
    before, after = mix(k, v), mix(changed_k, changed_v)
    assert torch.equal(before[0, 5:7], after[0, 5:7])


@pytest.mark.parametrize("cap", [None, 50.0])
def test_extreme_scores_stay_finite(cap: float | None) -> None:
    documents, positions = packed([16], [3], length=16)
    qkv = (torch.randn(2, 16, 4, 8) * 1e3).requires_grad_()
    cos, sin = (x.float() for x in angles(2, 16, 8))
    visibility = Visibility(documents, positions, 4)
    mixed = rotated_attention(qkv, cos, sin, visibility, heads=2, scale=1.0, cap=cap)
    values = value_and_gradients(mixed, (qkv,))
    assert all(value.isfinite().all() for value in values)


def test_bfloat16_is_within_its_rounding_of_float64() -> None:
    documents, positions = packed([40, 24], [64], length=64)
    visibility = Visibility(documents, positions, 32)
    qkv, (cos, sin) = wide(2, 64, 8, 16), angles(2, 64, 16)
    x, norm, matrix, down = wide(64, 32), wide(32), wide(24, 32), wide(8, 16)

    def results(dtype: torch.dtype) -> list[Tensor]:
        def leaf(tensor: Tensor) -> Tensor:
            rounded = tensor.detach().bfloat16().to(dtype)
            return rounded.requires_grad_()

        leaves = [leaf(tensor) for tensor in (qkv, x, norm, matrix, down)]
        turn = (cos.bfloat16().to(dtype), sin.bfloat16().to(dtype))
        mixed = rotated_attention(leaves[0], *turn, visibility, heads=4, scale=0.25, cap=50.0)
        product = norm_linear(leaves[1], leaves[2], leaves[3], 1e-6)
        gated = geglu_linear(leaves[1], leaves[4])
        return [
            *value_and_gradients(mixed, (leaves[0],)),
            *value_and_gradients(product, tuple(leaves[1:4])),
            *value_and_gradients(gated, (leaves[1], leaves[4])),
        ]

    for ours, exact in zip(results(torch.bfloat16), results(torch.float64), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < HALF * exact.norm()


def test_cached_attention_equals_the_full_one_where_it_sees_the_same() -> None:
    documents, positions = packed([7, 5], [12], length=12)
    visibility = Visibility(documents, positions, 5)
    q, k, v = wide(2, 12, 4, 6), wide(2, 12, 2, 6), wide(2, 12, 2, 6)
    cached = attention_cached(q, k, v, visibility.visible(), scale=0.4, cap=2.0)
    wanted = plain_attention(q, k, v, visibility, scale=0.4, cap=2.0)
    torch.testing.assert_close(cached, wanted, rtol=0, atol=EXACT)


def test_the_fused_kernel_without_a_cap_is_told_the_same_scale_and_mask() -> None:
    documents, positions = packed([7, 5], [9], length=12)
    visibility = Visibility(documents, positions, 4)
    q, k, v = wide(2, 12, 4, 6), wide(2, 12, 2, 6), wide(2, 12, 2, 6)
    found = cuda_attention(q, k, v, visibility, scale=0.3, cap=None)  # runs on a CPU as well
    wanted = plain_attention(q, k, v, visibility, scale=0.3, cap=None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_told_the_same_score_and_mask() -> None:
    """Its CPU form has a forward pass only, and eager; the score and mask are the CUDA path's."""
    from torch.nn.attention.flex_attention import flex_attention

    documents, positions = packed([100, 28], [128], length=128)
    for window in (None, 40):
        visibility = Visibility(documents, positions, window)
        q, k, v = (torch.randn(2, 128, heads, 16) for heads in (4, 2, 2))
        score, blocks = flex_parts(visibility, 2.0)
        mixed = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            score_mod=score, block_mask=blocks, scale=0.3, enable_gqa=True,
        )  # fmt: skip
        wanted = plain_attention(q, k, v, visibility, scale=0.3, cap=2.0)
        torch.testing.assert_close(mixed.transpose(1, 2), wanted, rtol=0, atol=1e-5)
        assert flex_parts(visibility, 2.0)[1] is blocks  # made once for all layers


def test_frozen_weights_get_no_gradient_and_change_no_other() -> None:
    x, norm, matrix, down = wide(5, 8), wide(8), wide(3, 8), wide(2, 4)
    frozen = norm_linear(x, norm.detach(), matrix.detach(), 1e-6)
    free = norm_linear(x, norm, matrix, 1e-6)
    assert_same(value_and_gradients(frozen, (x,)), value_and_gradients(free, (x,)), 0)
    frozen, free = geglu_linear(x, down.detach()), geglu_linear(x, down)
    assert_same(value_and_gradients(frozen, (x,)), value_and_gradients(free, (x,)), 0)
    constant = norm_linear(x.detach(), norm.detach(), matrix, 1e-6)
    (gradient,) = torch.autograd.grad(constant.sum(), matrix)
    assert gradient.shape == matrix.shape


@pytest.mark.parametrize("name", ["norm", "norm_linear", "geglu", "geglu_linear", "attention"])
def test_a_second_derivative_is_refused(name: str) -> None:
    x, norm, matrix, down = wide(1, 5, 8), wide(8), wide(3, 8), wide(2, 4)
    documents, positions = packed([5], length=5)
    visibility, (cos, sin) = Visibility(documents, positions, None), angles(1, 5, 2)
    value = {
        "norm": lambda: rms_norm(x, norm, 1e-6),
        "norm_linear": lambda: norm_linear(x, norm, matrix, 1e-6),
        "geglu": lambda: geglu(x),
        "geglu_linear": lambda: geglu_linear(x, down),
        "attention": lambda: rotated_attention(
            x.unflatten(-1, (4, 2)), cos, sin, visibility, heads=2, scale=1.0, cap=1.0
        ),
    }[name]()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cap", [None, 20.0])
def test_attention_on_a_gpu_equals_the_plain_one(cap: float | None) -> None:
    documents, positions = (x.cuda() for x in packed([100, 156], [200], length=256))
    visibility = Visibility(documents, positions, 64)
    qkv = torch.randn(2, 256, 8, 64, device="cuda", requires_grad=True)
    cos, sin = (x.float().cuda() for x in angles(2, 256, 64))
    found = rotated_attention(qkv, cos, sin, visibility, heads=4, scale=0.125, cap=cap)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    wanted = plain_attention(
        rope(q, cos, sin), rope(k, cos, sin), v, visibility, scale=0.125, cap=cap
    )
    gradient = torch.randn_like(found)
    assert_same(
        (found, *torch.autograd.grad(found, qkv, gradient)),
        (wanted, *torch.autograd.grad(wanted, qkv, gradient)),
        0.02,
    )
