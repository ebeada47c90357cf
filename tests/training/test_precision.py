from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from cabochon.core import Loss
from cabochon.training import OptimizerConfig, adamw, finish, fit, float32_weights
from cabochon.training.precision import master_of


class Tied(nn.Module):
    """The embedding is the head too, as in Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(16, 8))
        self.hidden = nn.Linear(8, 8)
        self.head = self.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedding[tokens])) @ self.head.T


def loss(model: nn.Module, tokens: Tensor) -> Loss:
    logprob = model(tokens).float().log_softmax(-1)
    nll = -logprob.gather(-1, tokens.roll(-1)[:, None])
    return Loss(total=nll.sum(), weight=torch.tensor(len(tokens)))


def bf16_model() -> Tied:
    torch.manual_seed(2)
    return Tied().bfloat16()


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(16, (5 + i,), generator=generator) for i in range(n)]


def test_micro_batches_accumulate_in_float32_bit_for_bit() -> None:
    """The oracle adds each micro-batch's bfloat16 gradients in float32 by hand."""
    model, oracle = bf16_model(), bf16_model()
    masters = dict(
        zip(dict(model.named_parameters()), map(master_of, model.parameters()), strict=True)
    )
    sums = {name: torch.zeros(p.shape) for name, p in oracle.named_parameters()}
    for batch in batches(7):
        loss(model, batch).total.backward()
        oracle.zero_grad()
        loss(oracle, batch).total.backward()
        for name, parameter in oracle.named_parameters():
            sums[name] += parameter.grad.float()
    for name, master in masters.items():
        assert torch.equal(master.grad, sums[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_training_in_bf16_is_float32_training_that_sees_rounded_weights() -> None:
    """The oracle keeps float32 weights and takes the gradients of a model rounded from them."""
    model, working = bf16_model(), bf16_model()
    config = OptimizerConfig(learning_rate=1e-2)
    exact = bf16_model().float()
    optimizer, exact_optimizer = adamw(model, config), adamw(exact, config)
    finish(fit(model, loss, batches(12), optimizer, accumulate=2, max_grad_norm=0.5))

    def gradients_of_rounded(_: nn.Module, batch: Tensor) -> Loss:
        for p, q in zip(working.parameters(), exact.parameters(), strict=True):
            p.data.copy_(q.data)
            p.grad = None
        summed = loss(working, batch)
        summed.total.backward()
        carrier = sum(
            (q * p.grad.float()).sum()
            for p, q in zip(working.parameters(), exact.parameters(), strict=True)
        )
        total = carrier + (summed.total - carrier).detach()
        return Loss(total=total, weight=summed.weight)

    steps = fit(
        exact, gradients_of_rounded, batches(12), exact_optimizer, accumulate=2, max_grad_norm=0.5
    )
    finish(steps)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(float32_weights(model)[name], q), name
        assert torch.equal(p, q.bfloat16()), name


def test_updates_too_small_for_bfloat16_are_not_lost() -> None:
    """A hundred updates of 1e-5 on weights of 1: each alone rounds away, their sum does not."""
    model = nn.Linear(4, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = adamw(model, OptimizerConfig(learning_rate=1e-4, weight_decay=0.0))

    def ascend(model: nn.Module, batch: Tensor) -> Loss:
        return Loss(total=-model(batch).sum().float(), weight=torch.tensor(1))

    finish(fit(model, ascend, [torch.ones(1, 4).bfloat16()] * 100, optimizer))
    torch.testing.assert_close(float32_weights(model)["weight"], torch.full((1, 4), 1.01))
    assert torch.equal(model.weight.detach().float(), torch.full((1, 4), 1.0078125))


def test_a_tied_parameter_has_one_master_that_both_uses_move() -> None:
    model = bf16_model()
    optimizer = adamw(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    next(fit(model, loss, batches(1), optimizer))
    assert model.head is model.embedding
    assert torch.equal(model.embedding, float32_weights(model)["embedding"].bfloat16())


def test_float32_parameters_are_their_own_masters() -> None:
    model = bf16_model()
    model.hidden.bias.data = model.hidden.bias.data.float()
    assert master_of(model.hidden.bias) is model.hidden.bias
    assert master_of(model.hidden.weight).dtype is torch.float32
    assert float32_weights(model)["hidden.bias"].data_ptr() == model.hidden.bias.data_ptr()


def test_a_second_optimizer_takes_the_gradients_over_and_the_first_can_go() -> None:
    model = bf16_model()
    first = adamw(model, OptimizerConfig())
    stale = weakref.ref(first.param_groups[0]["params"][0])
    second = adamw(model, OptimizerConfig(learning_rate=1e-2))
    before = model.hidden.weight.detach().clone()
    next(fit(model, loss, batches(1), second))
    assert not torch.equal(model.hidden.weight, before)
    assert all(p.grad is None for group in first.param_groups for p in group["params"])
    del first
    gc.collect()
    assert stale() is None


def test_when_its_optimizer_is_gone_a_model_keeps_its_own_gradients_again() -> None:
    model = bf16_model()
    optimizer = adamw(model, OptimizerConfig())
    del optimizer
    gc.collect()
    loss(model, batches(1)[0]).total.backward()
    assert model.hidden.weight.grad is not None
    assert float32_weights(model)["hidden.weight"].dtype is torch.bfloat16


def test_a_copy_of_the_model_does_not_send_its_gradients_to_the_masters() -> None:
    model = bf16_model()
    optimizer = adamw(model, OptimizerConfig())
    twin = copy.deepcopy(model)
    loss(twin, batches(1)[0]).total.backward()
    assert twin.hidden.weight.grad is not None
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_publishing_rounds_to_the_nearest(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    optimizer = adamw(model, OptimizerConfig())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, master in float32_weights(model).items():
        assert master.dtype is torch.float32
        assert torch.equal(dict(model.named_parameters())[name], master.to(dtype))
