"""The two ways of learning from text: what is minimised, and when it ends."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.algorithms import pretrain, sft
from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.chat import Message, encode_chat
from cabochon.data.packing import pack_chats, pack_tokens
from cabochon.data.tokenizer import train_tokenizer
from cabochon.models.gemma import Gemma, preset
from cabochon.training import OptimizerConfig, adamw, finish

CONFIG = replace(
    preset("gemma2-nano"), vocab_size=300, width=16, layers=2, heads=2, head_width=8,
    kv_heads=1, ffn_width=24, query_scalar=8, window=4,
)  # fmt: skip
PAPERS = [pretrain, sft]


def gemma(seed: int = 0, *, wild: float = 1.0) -> Gemma:
    model = Gemma.init(CONFIG, Key(seed))
    with torch.no_grad():
        model.embedding.mul_(wild)
    return model


def batch(seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 300, (length,), generator=generator) for length in (9, 5)]
    return TokenBatch.of(ids)


def gradients(model: Gemma, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_next_token_loss_is_the_dense_cross_entropy() -> None:
    model, rows = gemma(wild=20.0), batch()
    loss = pretrain.objective(model, rows)
    logprob = model(rows).logits(slice(None)).log_softmax(-1)
    picked = logprob.gather(1, rows.targets.flatten()[:, None])[:, 0]
    torch.testing.assert_close(loss.total, -picked[rows.mask.flatten()].sum())
    assert loss.weight.item() == 8 + 4


def test_distillation_has_the_gradient_of_the_divergence_to_the_teacher() -> None:
    student, teacher, rows = gemma(0, wild=20.0), gemma(1, wild=20.0), batch()
    loss = pretrain.distillation_objective(teacher)(student, rows)
    counted = rows.mask.flatten()
    theirs = teacher(rows).logits(slice(None)).log_softmax(-1)[counted].detach()
    mine = student(rows).logits(slice(None)).log_softmax(-1)[counted]
    divergence = (theirs.exp() * (theirs - mine)).sum()
    torch.testing.assert_close(loss.report["kl"], divergence.detach(), atol=1e-4, rtol=1e-4)
    for found, expected in zip(
        gradients(student, loss.total), gradients(student, divergence), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_left_to_learn() -> None:
    student, rows = gemma(wild=20.0), batch()
    loss = pretrain.distillation_objective(gemma(wild=20.0))(student, rows)
    assert loss.report["kl"].item() == 0.0
    assert max(g.abs().max().item() for g in gradients(student, loss.total)) < 1e-5


def test_the_teacher_receives_no_gradient() -> None:
    teacher = gemma(1)
    pretrain.distillation_objective(teacher)(gemma(0), batch()).total.backward()
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 1+1? It is 2. And then? 4, of course."], 290)


def chats(tokenizer, *pairs: tuple[str, str]):
    return [
        encode_chat(tokenizer, [Message("user", said), Message("model", answered)])
        for said, answered in pairs
    ]


def test_tuning_counts_model_turns_with_their_ends_and_nothing_else(tokenizer) -> None:
    (chat,) = chats(tokenizer, ("What is 1+1?", "It is 2."))
    rows = pack_chats([chat], 64).batch([0])
    loss = sft.objective(gemma(), rows)
    answer = tokenizer.encode("It is 2.")
    assert loss.weight.item() == len(answer) + 1
    learned = rows.targets[rows.mask].tolist()
    assert learned == [*answer, tokenizer.end_of_turn_id]


def test_packing_conversations_changes_neither_loss_nor_gradient(tokenizer) -> None:
    both = chats(tokenizer, ("What is 1+1?", "2"), ("And then?", "4, of course."))
    model = gemma(wild=20.0)
    together = sft.objective(model, pack_chats(both, 80).batch([0]))
    alone = [sft.objective(model, pack_chats([each], 80).batch([0])) for each in both]
    torch.testing.assert_close(together.total, alone[0].total + alone[1].total)
    torch.testing.assert_close(together.weight, alone[0].weight + alone[1].weight)
    for found, expected in zip(
        gradients(model, together.total),
        gradients(model, alone[0].total + alone[1].total),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def rows_of_text():
    generator = torch.Generator().manual_seed(7)
    return pack_tokens([torch.randint(3, 300, (20,), generator=generator).tolist()] * 6, 10)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_run_makes_its_updates_and_ends(paper) -> None:
    model = gemma()
    optimizer = adamw(model, OptimizerConfig(learning_rate=1e-2))
    config = paper.Config(steps=7, warmup=0)
    batches = rows_of_text().batches(Key(0), 2)
    steps = list(paper.train(config, model, batches, optimizer))
    assert [step.index for step in steps] == list(range(7))
    assert steps[-1].loss < steps[0].loss
    assert steps[-1].learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize("paper", PAPERS)
def test_going_on_from_an_update_is_never_having_stopped(paper) -> None:
    config = paper.Config(steps=6, accumulate=2, warmup=0)

    def after(*parts: range) -> dict[str, Tensor]:
        model = gemma()
        optimizer = adamw(model, OptimizerConfig(learning_rate=1e-2))
        for part in parts:
            batches = rows_of_text().batches(Key(0), 2, start=2 * part.start)
            steps = paper.train(config, model, batches, optimizer, start=part.start)
            made = [next(steps).index for _ in part]
            assert made == list(part)
        return dict(model.state_dict())

    whole, parts = after(range(6)), after(range(2), range(2, 6))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_run_that_is_complete_makes_no_update(paper) -> None:
    model = gemma()
    optimizer = adamw(model, OptimizerConfig())
    batches = rows_of_text().batches(Key(0), 2)
    assert finish(paper.train(paper.Config(steps=3), model, batches, optimizer, start=3)) is None


@pytest.mark.parametrize("paper", PAPERS)
def test_the_warm_up_is_a_tenth_of_a_run_unless_said_and_ends_at_full_height(paper) -> None:
    schedule = paper.Config(steps=40).learning_rate_schedule
    heights = [schedule(index) for index in range(40)]
    assert heights[3] == max(heights) == 1.0
    assert heights[:3] == sorted(heights[:3])
    assert heights[-1] == pytest.approx(0.1)
    assert paper.Config(schedule="constant", warmup=0).learning_rate_schedule(999) == 1.0
    assert paper.Config(schedule="linear", floor=0.0).learning_rate_schedule(999) < 0.3


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"warmup": -1},
        {"warmup": 10**6},
        {"floor": 2},
        {"max_grad_norm": 0},
    ],
)
def test_a_setting_out_of_range_is_named(paper, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        paper.Config(**wrong)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_config_cannot_change_under_a_run(paper) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.Config().steps = 3
