"""transformers' generate as a sampler: the engine's tokens, on any architecture."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_gemma import random_prompts, small_gemma

from cabochon.core import Group, Key
from cabochon.core.errors import ConfigError, DataError, MissingExtra, NonFinite
from cabochon.generation import engine, hugging_face
from cabochon.generation.engine import Settings
from cabochon.generation.score import score
from cabochon.models.foreign import ForeignModel, read_foreign
from cabochon.models.gemma.convert import write_gemma

transformers = pytest.importorskip("transformers")

SETTINGS = Settings(max_new_tokens=12, stop_ids=(7, 9, 11))


@pytest.fixture
def foreign(tmp_path: Path) -> ForeignModel:
    write_gemma(small_gemma(), tmp_path)
    return read_foreign(tmp_path)


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    torch.manual_seed(3)
    return transformers.MambaForCausalLM(config)


def same(first: list[Group], second: list[Group]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.prompt, other.prompt)
        for found, expected in zip(one.completions, other.completions, strict=True):
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.stopped == expected.stopped
            torch.testing.assert_close(found.logprob, expected.logprob, atol=1e-4, rtol=0)
            torch.testing.assert_close(
                found.model_logprob, expected.model_logprob, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, temperature=0.0),
        replace(SETTINGS, temperature=1.6, top_k=9, top_p=0.8),
        replace(SETTINGS, ends=(lambda tokens: sum(tokens) > 150,)),
    ],
    ids=["plain", "greedy", "cut", "ends"],
)
def test_it_draws_what_our_engine_draws(foreign: ForeignModel, settings: Settings) -> None:
    """Ragged prompts, ragged stops, on both sides of the window (6)."""
    prompts = random_prompts(3, 11, 3, 7)
    ours = engine.generate(small_gemma(), prompts, settings, Key(1), 3)
    theirs = hugging_face.sampler(foreign, settings, 3, rows=4)(prompts, Key(1))
    lengths = {len(c.tokens) for group in ours for c in group.completions}
    assert settings.temperature == 0.0 or len(lengths) > 2
    same(theirs, ours)


def test_some_of_a_list_are_written_alike_and_room_is_the_contexts(foreign: ForeignModel) -> None:
    prompts = random_prompts(3, 11, 60)
    how = Settings(max_new_tokens=12)
    together = hugging_face.generate(foreign, prompts, how, Key(1), 2)
    assert [len(c.tokens) for c in together[2].completions] == [4, 4]
    same(hugging_face.generate(foreign, prompts[1:], how, Key(1), 2, indices=[1, 2]), together[1:])


def test_every_prompt_may_have_settings_of_its_own(foreign: ForeignModel) -> None:
    prompts = random_prompts(5, 5, 8)
    each = [
        replace(SETTINGS, temperature=0.0),
        Settings(max_new_tokens=5, top_k=3),
        replace(SETTINGS, temperature=2.0),
    ]
    found = hugging_face.generate(foreign, prompts, each, Key(1), 2)
    same(found, engine.generate(small_gemma(), prompts, each, Key(1), 2))


def test_without_transformers_the_extra_is_named(
    foreign: ForeignModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"cabochon\[hf\]"):
        hugging_face.generate(foreign, random_prompts(3), SETTINGS, Key(0))


def test_recurrent_models_are_sampled_and_scored_too() -> None:
    """They cannot be padded or masked; nothing here is."""
    model = ForeignModel(mamba().eval())
    settings = replace(SETTINGS, temperature=0.8, top_k=30)
    groups = hugging_face.generate(model, random_prompts(3, 8, 5), settings, Key(1), 2)
    drawn = score(model, groups, temperature=0.8, top_k=30)
    for group, logprob, model_logprob in zip(groups, drawn, score(model, groups), strict=True):
        for place, found in enumerate(group.completions):
            torch.testing.assert_close(found.logprob, logprob[place], atol=1e-4, rtol=0)
            torch.testing.assert_close(found.model_logprob, model_logprob[place], atol=1e-4, rtol=0)


def test_the_defaults_of_a_folder_are_not_used_and_stay_as_they_were(foreign: ForeignModel) -> None:
    prompts = random_prompts(4)
    plain = hugging_face.generate(foreign, prompts, Settings(max_new_tokens=12), Key(1))
    meddling = transformers.GenerationConfig(
        repetition_penalty=5.0, eos_token_id=list(range(30)), bad_words_ids=[[3]], min_new_tokens=3
    )
    foreign.inner.generation_config = meddling
    same(hugging_face.generate(foreign, prompts, Settings(max_new_tokens=12), Key(1)), plain)
    assert foreign.inner.generation_config is meddling


def test_what_cannot_be_done_is_refused(foreign: ForeignModel) -> None:
    with pytest.raises(DataError, match="prompt 1 has shape"):
        hugging_face.generate(foreign, [*random_prompts(2), torch.zeros(0)], SETTINGS, Key(0))
    with pytest.raises(DataError, match="64 tokens, the model's context is 64"):
        hugging_face.generate(foreign, random_prompts(64), SETTINGS, Key(0))
    with pytest.raises(ConfigError, match="samples"):
        hugging_face.generate(foreign, random_prompts(2), SETTINGS, Key(0), 0)
    with pytest.raises(ConfigError, match="indices"):
        hugging_face.generate(foreign, random_prompts(2), SETTINGS, Key(0), indices=[1, 2])
    with pytest.raises(ConfigError, match="got 1 settings for 2"):
        hugging_face.generate(foreign, random_prompts(2, 3), [SETTINGS], Key(0))
    with torch.no_grad():
        foreign.inner.get_input_embeddings().weight[5] = torch.nan
    foreign.inner.lm_head.weight = torch.nn.Parameter(foreign.inner.lm_head.weight.nan_to_num())
    prompts = [torch.tensor([2, 3]), torch.tensor([2, 5])]
    with pytest.raises(NonFinite, match="prompt 1, sample 0, token 0") as caught:
        hugging_face.generate(foreign, prompts, SETTINGS, Key(0))
    assert len(caught.value.finished[0].completions[0].tokens) > 0
    assert len(caught.value.finished[1].completions[0].tokens) == 0
