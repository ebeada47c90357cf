"""A reward model from elsewhere, with a tokenizer of its own, wherever a user may name one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workshop import Workshop, call, write_jsonl

from cabochon import folders
from cabochon.data.chat import Message
from cabochon.data.tokenizer import Tokenizer
from cabochon.evaluation.pairs import pair_accuracy
from cabochon.rewards.preference_model import score_sequences
from cabochon.rewards.preference_texts import encode_exchange
from cabochon.rewards.records import replayed
from cabochon.rewards.texts import Exchange


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("published")
    done = workshop.train(
        "--model", workshop.run, "--learning-rate", "1e-2", "--steps", 4, "--out", place / "model",
        algorithm="sft",
    )  # fmt: skip
    assert done.code == 0, done.err
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"{a}+1"} for a in range(12)])
    return place


def words(folder: Path, reward: Path, *more: object) -> list[object]:
    return [
        "--model", folder / "model", "--data", folder / "prompts.jsonl", "--reward", reward,
        "--steps", 2, "--context", 48, "--max-new-tokens", 6, "--batch-size", 3, "--threads", 1,
        "--device", "cpu", *more,
    ]  # fmt: skip


def expected(judge: Path, prompt: str, said: str) -> float:
    model, own = folders.load_reward(judge)
    turns = (Message("user", prompt),)
    row = encode_exchange(own, Exchange(prompt=turns, completion=said, name=""))
    return float(score_sequences(model, [row]))


@pytest.mark.parametrize("algorithm", ["rlhf", "bond"])
def test_it_rewards_what_a_policy_writes(
    folder: Path, published_reward: Path, tmp_path: Path, algorithm: str
) -> None:
    judge = shutil.copytree(published_reward, tmp_path / "judge")
    given = words(folder, judge, "--out", tmp_path / "run", "--checkpoint-every", 1)
    done = call("train", algorithm, *given)
    assert done.code == 0, done.err
    policy = Tokenizer.load(tmp_path / "run/checkpoints/step-2/model")
    for each in replayed(tmp_path / "run" / "rollouts", 0):
        assert list(each.scores.parts) == [str(judge)]
        for group, scores in zip(each.groups, each.scores.total.tolist(), strict=True):
            prompt = policy.decode(group.prompt.tolist())
            asked = prompt.removeprefix("user\n").removesuffix("\nmodel\n")
            for completion, score in zip(group.completions, scores, strict=True):
                said = policy.decode(completion.tokens.tolist())
                assert score == pytest.approx(expected(judge, asked, said), abs=1e-5)
    resumed = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-2")
    assert call("resume", resumed).code == 0
    one, other = (load_file(run / "checkpoints/step-2/model/model.safetensors")
                  for run in (tmp_path / "run", resumed))  # fmt: skip
    assert all(torch.equal(one[name], other[name]) for name in one)
    template = (judge / "chat_template.jinja").read_text()
    (judge / "chat_template.jinja").write_text(template + "!")
    shutil.rmtree(resumed / "checkpoints" / "step-2")
    done = call("resume", resumed)
    assert done.code != 0
    assert "reward_0_tokenizer" in done.err


def test_what_it_has_no_room_for_ends_the_run_with_the_sample(
    folder: Path, published_reward: Path, tmp_path: Path
) -> None:
    judge = shutil.copytree(published_reward, tmp_path / "judge")
    config = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    given = words(folder, judge, "--out", tmp_path / "run")
    done = call("train", "rlhf", *given)
    assert done.code != 0
    assert "prompt 0, sample 0" in done.err
    assert "tokens of the reward model's tokenizer" in done.err
    done = call("doctor", "rlhf", *given)
    assert done.code == 1
    assert "nothing is cut off" in done.out


def test_doctor_and_plan_know_it(folder: Path, published_reward: Path, tmp_path: Path) -> None:
    given = words(folder, published_reward)
    done = call("doctor", "bond", *given)
    assert done.code == 0, done.out
    assert "another tokenizer than the policy's" in done.out
    assert "in its own chat format" in done.out
    bare = shutil.copytree(published_reward, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    done = call("doctor", "bond", *words(folder, bare))
    assert done.code == 1
    assert "neither Gemma's turn tokens nor a chat template" in " ".join(done.out.split())
    done = call("plan", "rlhf", *given, "--json")
    assert done.code == 0, done.err
    size = (published_reward / "model.safetensors").stat().st_size
    assert done.answer["memory_bytes"]["judges"] == size
    assert done.answer["memory_bytes"]["teacher"] == 0


def test_texts_and_pairs_are_judged_by_it(
    folder: Path, published_reward: Path, tmp_path: Path
) -> None:
    texts = [("2+2", "4", "5"), ("say it", "  spaced ", "no")]
    rows = [{"prompt": ask, "completion": said} for ask, *both in texts for said in both]
    data = write_jsonl(tmp_path / "answers.jsonl", rows)
    done = call(
        "evaluate", "rewards", data, "--tokenizer", folder / "model", "--reward", published_reward,
        "--threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    scores = torch.tensor([[expected(published_reward, a, s) for s in b] for a, *b in texts])
    assert done.answer["rewards"]["total"]["mean"] == pytest.approx(float(scores.mean()), abs=1e-5)
    pairs = [{"prompt": ask, "chosen": one, "rejected": two} for ask, one, two in texts]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    done = call("evaluate", "preferences", published_reward, file, "--threads", 1, "--json")
    assert done.code == 0, done.err
    assert done.answer["margin"] == pytest.approx(pair_accuracy(*scores.T).margin, abs=1e-5)
    longer = [*pairs, {"prompt": [{"role": "user", "content": "x" * 999}],
                       "chosen": "a", "rejected": "b"}]  # fmt: skip
    write_jsonl(file, longer)
    words = ("evaluate", "preferences", published_reward, file, "--threads", 1)
    assert "too-long drop" in call(*words).err
    assert call(*words, "--too-long", "drop", "--json").answer["left_out"]["too_long"] == 1


def test_merged_policies_learn_from_it(
    folder: Path, published_reward: Path, tmp_path: Path
) -> None:
    done = call(
        "run", "warp", "--model", folder / "model", "--data", folder / "prompts.jsonl",
        "--reward", published_reward, "--steps", 1, "--batch-size", 2, "--samples", 2,
        "--held-out", 4, "--judged-samples", 1, "--max-new-tokens", 4, "--threads", 1,
        "--out", tmp_path / "warp",
    )  # fmt: skip
    assert done.code == 0, done.err
