"""WARM: what averaging must leave alone, what is refused, and the same result after a kill."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon import folders
from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, DataError, RunChanged, WeightsMismatch
from cabochon.data.tokenizer import Tokenizer, train_tokenizer
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel
from cabochon.pipelines import warm
from cabochon.weights.interpolate import average

WORDS = ["red", "blue", "green", "old", "new", "cat", "dog", "tree", "house", "river"]


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    """The answer that names the prompt's first word is preferred."""
    stream = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = stream.sample(WORDS, 3)
        rows.append({"prompt": " ".join(prompt), "chosen": prompt[0], "rejected": prompt[1]})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"user\n{' '.join(WORDS)}\nmodel\n"] * 3, 300)


def start(folder: Path, tokenizer: Tokenizer, seed: int, nudge: int = 0) -> str:
    """A model folder; a nudge is what a few more updates would do."""
    config = GemmaConfig(
        vocab_size=tokenizer.vocab_size, width=24, layers=2, heads=2, kv_heads=1, head_width=12,
        ffn_width=32, query_scalar=12, window=8, attention_cap=50.0, final_cap=30.0,
        post_norms=True, context=48, pad_id=tokenizer.control("pad"),
        eos_id=tokenizer.control("eos"), bos_id=tokenizer.control("bos"),
    )  # fmt: skip
    model = Gemma.init(config, Key(seed))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stream = Key(nudge).fold(name).generator()
            weight.add_(torch.randn(weight.shape, generator=stream) * 0.002 * bool(nudge))
    folders.save(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> warm.Config:
    shop = tmp_path_factory.mktemp("shop")
    return warm.Config(
        starts=tuple(start(shop / f"s{n}", tokenizer, 0, nudge=n) for n in range(2)),
        data=write(shop / "train.jsonl", pairs(1, 60)),
        held_out=write(shop / "held_out.jsonl", [*pairs(7, 200)][-40:]),
        members=3,
        average=2,
        flipped=0.25,
        steps=8,
        batch_size=8,
        learning_rates=(3e-3, 1e-3),
        probe_steps=4,
        probe_learning_rate=1e-2,
        context=48,
        threads=1,
    )


@pytest.fixture(autouse=True)
def distinct(config: warm.Config) -> None:
    """Words are few: what is held out must not be learned."""
    learned = {row["prompt"] for row in map(json.loads, Path(config.data).read_text().splitlines())}
    rows = [json.loads(line) for line in Path(config.held_out).read_text().splitlines()]
    kept = [row for row in rows if row["prompt"] not in learned]
    if len(kept) < len(rows):
        write(Path(config.held_out), kept)


@pytest.fixture(scope="module")
def whole(config: warm.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "warm"


def finished(config: warm.Config, whole: Path) -> dict[str, Any]:
    return dict(warm.run(config, whole))


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(folders.load_reward(folder)[0].state_dict())


def test_the_average_is_the_float32_mean_of_the_best_members(
    config: warm.Config, whole: Path
) -> None:
    results = finished(config, whole)
    ranked = results["order"]
    accuracies = [results["members"][number]["held_out"] for number in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    assert results["averaged"] == sorted(ranked[:2])
    members = [
        weights(whole / f"member-{number}" / "checkpoints" / "step-8" / "model")
        for number in results["averaged"]
    ]
    expected = average(members)
    for name, weight in weights(whole / "warm").items():
        torch.testing.assert_close(weight, expected[name], rtol=0.0, atol=1e-7)
    assert set(results["sets"]) == {"corrupted", "clean", "held_out"}
    assert "| 0" in (whole / "report.md").read_text()
    assert "Reward models, averaged" in (whole / "report.html").read_text()
    assert json.loads((whole / "results.json").read_text()) == json.loads(json.dumps(results))


def test_members_share_the_head_and_differ_in_the_rest(config: warm.Config, whole: Path) -> None:
    finished(config, whole)
    recipes = [warm.recipe_of(config, number) for number in range(4)]
    assert [recipe.start for recipe in recipes] == [0, 1, 0, 1]
    assert len({(r.start, r.learning_rate) for r in recipes}) == 4
    head = weights(whole / "probe" / "checkpoints" / "step-4" / "model")
    assert bool(head["score"].abs().max() > 0.0)
    began = weights_of_start(config, 1)
    for name, weight in head.items():
        if name != "score":
            assert torch.equal(weight, began[name.removeprefix("backbone.")])


def weights_of_start(config: warm.Config, number: int) -> dict[str, Tensor]:
    return dict(folders.load_model(config.starts[number]).state_dict())


def test_again_it_is_found_complete_and_another_recipe_is_refused(
    config: warm.Config, whole: Path
) -> None:
    first = finished(config, whole)
    notes: list[str] = []
    assert warm.run(config, whole, lambda event: notes.append(event.note)) == first
    assert notes.count("is complete") == 4
    with pytest.raises(RunChanged):
        warm.run(replace(config, steps=9), whole)


def test_killed_within_a_member_it_ends_with_the_same_bits(
    config: warm.Config, whole: Path, tmp_path: Path
) -> None:
    expected = finished(config, whole)
    folder = tmp_path / "killed"
    code = (
        "import sys, torch; from cabochon.pipelines import warm\n"
        "torch.set_num_threads(1)\n"
        f"warm.run(warm.{config!r}, __import__('pathlib').Path({str(folder)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120.0
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / "member-1" / "metrics.jsonl").is_file():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
    again = dict(warm.run(config, folder))
    assert {**again, "model": ""} == {**expected, "model": ""}
    for name, weight in weights(folder / "warm").items():
        assert torch.equal(weight, weights(whole / "warm")[name]), name


def test_a_single_member_is_itself_and_so_are_identical_ones() -> None:
    models = [reward(1), reward(1), reward(1)]
    for name, weight in average(models).items():
        torch.testing.assert_close(weight, models[0][name], rtol=0.0, atol=1e-7)
    for name, weight in average(models[:1]).items():
        assert torch.equal(weight, models[0][name])


def test_the_order_of_the_members_changes_nothing_beyond_rounding() -> None:
    models = [reward(seed) for seed in range(3)]
    first = average(models)
    for order in permutations(models):
        for name, weight in average(order).items():
            torch.testing.assert_close(weight, first[name], rtol=0.0, atol=1e-6)


GEMMA = GemmaConfig(
    vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24,
    query_scalar=8, window=8, attention_cap=50.0, final_cap=30.0, post_norms=True, context=32,
)  # fmt: skip


def reward(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    """One base model, with an offset of its own for each seed but 0."""
    model = RewardModel(Gemma.init(GEMMA, Key(0)), drawn((1, 16), "head"))
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    return {
        name: (weight + spread * 0.05 * drawn(weight.shape, f"{seed}/{name}")).float()
        for name, weight in state.items()
    }


def drawn(shape: tuple[int, ...] | torch.Size, name: str) -> Tensor:
    return torch.randn(shape, generator=Key(8).fold(name).generator(), dtype=torch.float64)


def scores_of(state: dict[str, Tensor]) -> Tensor:
    model = RewardModel(Gemma(GEMMA, dtype=torch.float64)).double()
    model.load_state_dict({name: weight.double() for name, weight in state.items()})
    stream = Key(5).generator()
    texts = [torch.randint(3, 40, (9,), generator=stream) for _ in range(32)]
    with torch.no_grad():
        features = model.features(TokenBatch.of(texts))
        return (features @ model.score.T).squeeze(-1)


def test_of_heads_on_frozen_features_the_average_is_the_ensemble_exactly() -> None:
    base = reward(1)
    members = [{**base, "score": drawn((1, 16), f"h{n}").float()} for n in range(4)]
    ensemble = torch.stack([scores_of(member) for member in members]).mean(0)
    torch.testing.assert_close(scores_of(average(members)), ensemble, rtol=1e-5, atol=1e-6)


def test_the_gap_to_the_ensemble_is_of_second_order_in_the_spread() -> None:
    def gap(spread: float) -> float:
        members = [reward(seed, spread) for seed in range(1, 5)]
        ensemble = torch.stack([scores_of(member) for member in members]).mean(0)
        return (scores_of(average(members)) - ensemble).abs().mean().item()

    assert gap(0.02) / gap(0.01) == pytest.approx(4.0, rel=0.15)


def test_the_average_keeps_a_feature_by_the_square_of_its_frequency() -> None:
    """WARM's theory: members hold feature j in a unit of their own with probability p_j.

    A unit has an input and an output weight, both 1 where the member has the feature: averaging
    outputs weighs it by p_j, averaging weights by p_j times p_j.
    """
    frequency = torch.tensor([0.95, 0.9, 0.7, 0.5, 0.3, 0.1])
    stream = Key(6).generator()
    held = (torch.rand(4000, 6, generator=stream) < frequency).float()
    members = [{"up": row, "down": row} for row in held]
    ensemble = torch.stack([each["up"] * each["down"] for each in members]).mean(0)
    merged = average(members)
    product = merged["up"] * merged["down"]
    torch.testing.assert_close(ensemble, frequency, rtol=0.0, atol=0.03)
    torch.testing.assert_close(product, frequency.square(), rtol=0.0, atol=0.03)


def test_starts_of_different_runs_and_shapes_are_refused(
    config: warm.Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stranger = start(tmp_path / "stranger", tokenizer, 5)
    with pytest.raises(WeightsMismatch, match="not trained from the same start"):
        warm.run(replace(config, starts=(*config.starts, stranger)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other = train_tokenizer(["quite another text about mountains and lakes and skies"], 290)
    folders.save(
        Gemma.init(replace(GEMMA, vocab_size=other.vocab_size, pad_id=other.control("pad"),
                           eos_id=other.control("eos"), bos_id=other.control("bos")), Key(0)),
        other, tmp_path / "other",
    )  # fmt: skip
    with pytest.raises(WeightsMismatch, match="different tokenizers"):
        warm.run(
            replace(config, starts=(*config.starts, str(tmp_path / "other"))), tmp_path / "run"
        )


def test_what_is_judged_on_must_not_be_learned(config: warm.Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must not be learned"):
        warm.run(replace(config, held_out=config.data), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": ()}, "at least one model folder"),
        ({"average": 4}, "average at most as many"),
        ({"flipped": 1.5}, "a share in"),
        ({"batch_size": 7}, "must be even"),
        ({"dropouts": (1.0,)}, "dropout must lie"),
        ({"learning_rates": ()}, "at least one value"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    config: warm.Config, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(config, **changes)
