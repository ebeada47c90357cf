"""The compiled step says what the ordinary one says, whatever changes between its calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.core import Completion, Key
from cabochon.core.errors import ConfigError
from cabochon.generation.engine import Settings, generate
from cabochon.models.gemma import Gemma, GemmaConfig, preset
from cabochon.models.gemma.few import attend_few, attend_few_fused
from cabochon.models.gemma.step import int8

CLOSE = 1e-4
"""Float32 log-probabilities of logits of standard deviation about 1."""


def lively(config: GemmaConfig, seed: int = 0) -> Gemma:
    """A model whose every part matters: norm weights that are not 0."""
    model = Gemma.init(config, Key(seed))
    generator = Key(seed).fold("lively").generator()
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    return model.eval()


def small(**changes: object) -> GemmaConfig:
    base = replace(preset("gemma2-nano"), vocab_size=100, layers=2, window=8, context=64)
    return replace(base, **changes)  # type: ignore[arg-type]


def prompts(*lengths: int) -> list[Tensor]:
    generator = Key(7).generator()
    return [torch.randint(3, 100, (length,), generator=generator) for length in lengths]


def written(model: Gemma, texts: list[Tensor], new: int, **how: object) -> list[Completion]:
    groups = generate(model, texts, Settings(max_new_tokens=new), Key(3), **how)  # type: ignore[arg-type]
    return [completion for group in groups for completion in group.completions]


def alike(model: Gemma, compiled: Gemma, texts: list[Tensor], new: int, **how: object) -> None:
    for one, other in zip(
        written(model, texts, new, **how), written(compiled, texts, new, **how), strict=True
    ):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.model_logprob - other.model_logprob).abs().max() < CLOSE


def test_rows_that_come_and_go_lengths_and_rings_are_those_of_the_ordinary_step() -> None:
    model = lively(small())
    compiled = model.with_compiled_decoding("eager")
    assert compiled.embedding is model.embedding
    alike(model, compiled, prompts(3, 9, 1), 5)  # as long as the window, no ring yet
    alike(model, compiled, prompts(3, 20, 11, 5, 2), 24, rows=2)  # rings, and slots given on
    alike(model, compiled, prompts(12), 12)  # a single row
    alike(model, compiled, prompts(4, 6), 9, samples=3)


def test_new_weights_are_followed_without_compiling_again() -> None:
    model = lively(small())
    compiled = model.with_compiled_decoding("eager")
    alike(model, compiled, prompts(3, 9), 6)
    before = written(compiled, prompts(3, 9), 6)
    made = compiled._compiled
    assert made is not None
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = written(compiled, prompts(3, 9), 6)
        alike(model, compiled, prompts(5, 9), 6)
    assert [c.model_logprob.tolist() for c in before] != [c.model_logprob.tolist() for c in after]


def test_two_models_do_not_meet_in_the_compiler() -> None:
    first, second = lively(small()), lively(small(width=64, heads=2, query_scalar=8), seed=1)
    compiled = [model.with_compiled_decoding("eager") for model in (first, second)]
    for _ in range(2):
        alike(first, compiled[0], prompts(3, 9), 4)
        alike(second, compiled[1], prompts(3, 9), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_layouts_and_types_can_be_compiled(dtype: torch.dtype) -> None:
    model = lively(small()).to(dtype)
    rounded = model.with_int8_decoding()
    assert rounded._layout is int8
    for one in (model, rounded):
        alike(one, one.with_compiled_decoding("eager"), prompts(3, 9), 5)


def test_a_draft_and_its_model_may_both_be_compiled() -> None:
    model, draft = lively(small()), lively(small(layers=1))
    expected = written(model, prompts(3, 9), 12, draft=draft, ahead=2)
    found = written(
        model.with_compiled_decoding("eager"), prompts(3, 9), 12,
        draft=draft.with_compiled_decoding("eager"), ahead=2,
    )  # fmt: skip
    assert [c.tokens.tolist() for c in expected] == [c.tokens.tolist() for c in found]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself
def test_the_real_compiler_makes_the_same_numbers() -> None:
    model = lively(small(layers=1))
    alike(model, model.with_compiled_decoding(), prompts(3, 20, 11), 12)


def test_without_a_c_compiler_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "my-c++")
    with pytest.raises(ConfigError, match=r"my-c\+\+, g\+\+, clang\+\+"):
        lively(small()).with_compiled_decoding()


@pytest.mark.parametrize("cap", [None, 2.0, 1000.0])
@pytest.mark.parametrize("few", [1, 3])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_the_fused_attention_to_a_cache_is_the_ordinary_one(cap: float | None, few: int) -> None:
    config = small(attention_cap=cap, heads=4, kv_heads=2, head_width=16, query_scalar=16)
    rows, slots, lines = 3, 7, 3 * 2 * 2 * 10
    draw = Key(2).generator()
    held = torch.randn(2, rows * 2, 10, 16, generator=draw)  # 9 slots a row and the last one
    queries = torch.randn(rows * few, 4, 16, generator=draw)
    new = torch.randn(rows * few, 4, 16, generator=draw)
    index = torch.randperm(lines, generator=draw)[: rows * few * 4]
    unseen = torch.rand(rows, 1, few, slots, generator=draw) < 0.4
    unseen[..., 0] = False
    bias = torch.where(unseen, -torch.inf, 0.0)
    found = []
    for attend in (attend_few, attend_few_fused):
        memory = held.clone()
        found.append((attend(config, memory, index, bias)(queries, new), memory))
    # A cap of 1,000 multiplies what tanh rounds, 6e-8, by as much.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4 if cap == 1000.0 else 1e-5)
    assert found[0][0].shape == (rows * few, 4 * 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_recorded_steps_are_those_of_the_ordinary_step() -> None:
    model = lively(small(width=64, heads=4, kv_heads=2, head_width=16, query_scalar=16)).cuda()
    compiled = model.with_compiled_decoding()
    rows = [row.cuda() for row in prompts(3, 20, 11, 5, 2)]
    for new in (5, 24):
        for one, other in zip(
            written(model, rows, new, rows=2), written(compiled, rows, new, rows=2), strict=True
        ):
            assert (one.model_logprob[:3] - other.model_logprob[:3]).abs().max() < 1e-3
