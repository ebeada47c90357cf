"""Rewards by name, as `--reward` takes them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cabochon import folders
from cabochon.cli.rewards import RewardSettings, load_reward, reward_sources
from cabochon.core import Completion, Group, Key
from cabochon.core.errors import ConfigError, DataError, FolderError
from cabochon.data.chat import Message, decode_prompt, encode_prompt
from cabochon.data.preferences import encode_answer
from cabochon.data.prompts import Prompt
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel
from cabochon.rewards.preference_model import score_sequences
from cabochon.rewards.preference_texts import preferred_texts
from cabochon.rewards.scores import scores
from cabochon.rewards.texts import judged_together


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x\n", "#### 42"], 280)


def group(tokenizer: Tokenizer, prompt: str, *texts: str) -> Group:
    def completion(text: str) -> Completion:
        tokens = torch.tensor(tokenizer.encode(text, eos=True))
        zeros = torch.zeros(len(tokens))
        return Completion(tokens=tokens, logprob=zeros, model_logprob=zeros, stopped=True)

    return Group(
        prompt=torch.tensor(tokenizer.encode(prompt, bos=True)),
        completions=tuple(map(completion, texts)),
    )


def total(tokenizer: Tokenizer, groups: list[Group], *names: str, **more: Any) -> list[Any]:
    settings = RewardSettings(reward=names, **more)
    return list(scores(load_reward(settings, tokenizer), groups).total.tolist())


def test_each_name_is_its_reward(tokenizer: Tokenizer) -> None:
    groups = [group(tokenizer, "def f(x):\n", "    return x\n", "x ==")]
    assert total(tokenizer, groups, "parses") == [[1.0, 0.0]]
    assert total(tokenizer, groups, "parses:prompt") == [[1.0, 0.0]]
    assert total(tokenizer, groups, "docstring:prompt") == [[0.0, 0.0]]
    assert total(tokenizer, groups, "matches:ret.rn", "matches:x") == [[2.0, 1.0]]
    assert total(tokenizer, groups, "matches:x", reward_weights=(-0.5,)) == [[-0.5, -0.5]]
    assert total(tokenizer, groups, "length:1")[0][1] < 0.0
    assert total(tokenizer, groups, "repetition:9") == [[0.0, 0.0]]


def test_numbers_come_from_the_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = tmp_path / "maths.jsonl"
    rows = [{"prompt": "6*7", "answer": "6*7 = 42\n#### 42"}, {"prompt": "1+1", "answer": "2"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [
        Prompt(tuple(tokenizer.encode(row["prompt"], bos=True)), (), f"{data}:{number}")
        for number, row in enumerate(rows, 1)
    ]
    settings = RewardSettings(reward=("number",))
    reward = load_reward(settings, tokenizer, prompts=prompts, data=[str(data)])
    found = scores(reward, [group(tokenizer, "6*7", "42", "so #### 42.0", "41")])
    assert found.total.tolist() == [[1.0, 1.0, 0.0]]
    assert found.parts["number"].tolist() == [[1.0, 1.0, 0.0]]
    with pytest.raises(DataError, match=r"sums:1: no number in the answer ''"):
        load_reward(settings, tokenizer, prompts=[Prompt((1,), (), "sums:1")])


def test_functions_of_ones_own(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import torch, time\n"
        "def calm(prompt, completion):\n    return -completion.count('!')\n"
        "def size(groups):\n"
        "    return torch.tensor([[2.0] * len(g.completions) for g in groups])\n"
        "def sleeps(groups):\n"
        "    time.sleep(60 * any(len(c.tokens) > 3 for g in groups for c in g.completions))\n"
        "    return size(groups)\n"
        "def three(a, b, c):\n    return 0\n"
        "def leaves(prompt, completion):\n    raise SystemExit(4)\n"
        "def leave(groups):\n    raise SystemExit(4)\n"
    )
    monkeypatch.chdir(tmp_path)
    groups = [group(tokenizer, "p", "oh!!", "ok")]
    assert total(tokenizer, groups, "python:my_rewards.calm") == [[-2.0, 0.0]]
    assert total(tokenizer, groups, "python:my_rewards.size") == [[2.0, 2.0]]
    with pytest.raises(DataError, match=r"sample 0 .*longer than 0.1 s"):
        total(tokenizer, groups, "python:my_rewards.sleeps", reward_timeout=0.1)
    for name in ("leaves", "leave"):
        with pytest.raises(DataError, match="SystemExit: 4"):
            total(tokenizer, groups, f"python:my_rewards.{name}")
    for never in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="reward_timeout is above 0 and at most"):
            RewardSettings(reward=("parses",), reward_timeout=never)
    for wrong in ("my_rewards.three", "my_rewards.absent", "nowhere.f", "calm"):
        with pytest.raises(ConfigError, match=wrong):
            total(tokenizer, groups, f"python:{wrong}")


def small_judge(tokenizer: Tokenizer) -> RewardModel:
    config = GemmaConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_width=8,
        ffn_width=24, query_scalar=8, window=4, attention_cap=None, final_cap=None,
        post_norms=True, context=64, pad_id=tokenizer.control("pad"), eos_id=tokenizer.eos_id or 0,
        bos_id=tokenizer.control("bos"),
    )  # fmt: skip
    head = torch.randn(1, 16, generator=Key(1).generator())
    return RewardModel(Gemma.init(config, Key(0)), head)


def test_a_reward_model_is_its_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders.save(small_judge(tokenizer), tokenizer, tmp_path / "judge")
    groups = [group(tokenizer, "p", "oh!!", "ok")]
    name = str(tmp_path / "judge")
    said = total(tokenizer, groups, name, "matches:k")
    assert said[0][0] != said[0][1]
    assert reward_sources(RewardSettings(reward=(name, "parses"))) == {"reward_0": name}


def test_a_reward_model_of_another_tokenizer_reads_texts(
    tokenizer: Tokenizer, published_reward: Path
) -> None:
    """By name as in Python, which tests/rewards compares with transformers."""
    model, own = folders.load_reward(published_reward)
    settings = RewardSettings(reward=(str(published_reward),))
    talk = encode_prompt(tokenizer, [Message("user", "def f?")])
    said = group(tokenizer, "def f(x):\n", "    return x\n", "x ==")
    for prompt, plain in ((tokenizer.encode("def f?", bos=True), True), (talk, False)):
        one = replace(said, prompt=torch.tensor(prompt))
        turns = None if plain else partial(decode_prompt, tokenizer)
        by_hand = judged_together(preferred_texts(model, own), tokenizer.decode, turns)
        by_name = load_reward(settings, tokenizer, plain=plain)
        assert torch.equal(by_name([one]), by_hand([one]))
    with pytest.raises(DataError, match=r"prompt 0: 'def f.*expected <start_of_turn>"):
        load_reward(settings, tokenizer)([said])


def test_what_another_familys_template_wrote_is_found_among_the_data(
    tokenizer: Tokenizer, published_reward: Path, tmp_path: Path
) -> None:
    """The policy is of another family too, whose turns cannot be read from tokens."""
    policy = Tokenizer.load(published_reward)
    folders.save(small_judge(tokenizer), tokenizer, tmp_path / "judge")
    judge, own = folders.load_reward(tmp_path / "judge")
    talk = [Message("user", "a"), Message("model", "b"), Message("user", "c")]
    rows = [{"messages": [{"role": m.role, "content": m.content} for m in talk]}]
    data = tmp_path / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RewardSettings(reward=(str(tmp_path / "judge"),))
    reward = load_reward(settings, policy, data=[str(data)])
    for turns in (talk[:1], talk):
        tokens = torch.tensor(policy.encode("yes", eos=True))
        zeros = torch.zeros(len(tokens))
        said = Completion(tokens=tokens, logprob=zeros, model_logprob=zeros, stopped=True)
        prompt = torch.tensor(encode_prompt(policy, turns))
        row = encode_answer(own, turns, "yes")
        expected = score_sequences(judge, [row])
        assert torch.equal(reward([Group(prompt=prompt, completions=(said,))])[0], expected)
    stranger = Group(prompt=prompt[:-1], completions=(said,))
    with pytest.raises(DataError, match="it is no prompt of the data"):
        reward([stranger])


def test_what_cannot_be_written_for_a_reward_model_is_refused_at_once(
    tokenizer: Tokenizer, published_reward: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(published_reward, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    settings = RewardSettings(reward=(str(bare),))
    with pytest.raises(
        ConfigError, match=r"neither Gemma's turn tokens nor a chat template.*plain"
    ):
        load_reward(settings, tokenizer)
    load_reward(settings, tokenizer, plain=True)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(FolderError, match=r"holds no tokenizer\.json"):
        load_reward(settings, tokenizer, plain=True)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "what is good"),
        (("parse",), "did you mean 'parses'"),
        (("matches",), "matches:REGEX"),
        (("number:exact",), "behind ####"),
        (("length:long",), "a number of tokens"),
        (("parses", "parses"), "a name of its own"),
        (("matches:(",), "no regular expression"),
    ],
)
def test_names_that_are_none_are_refused(
    tokenizer: Tokenizer, names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        load_reward(RewardSettings(reward=names), tokenizer)


def test_scales_are_measured_once_or_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reference = [group(tokenizer, "p", "a", "aaaa"), group(tokenizer, "q", "aa", "aaaaaa")]
    settings = RewardSettings(reward=("length",), reward_normalise="2")
    reward = load_reward(settings, tokenizer, draw=lambda count: reference[:count])
    assert scores(reward, reference).total.mean().item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match="nobody draws"):
        load_reward(settings, tokenizer)
    with pytest.raises(ConfigError, match="neither a number of prompts nor a file"):
        RewardSettings(reward=("length",), reward_normalise=str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="2 reward weights for 1"):
        RewardSettings(reward=("length",), reward_weights=(1.0, 2.0))
