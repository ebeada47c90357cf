"""Under autocast a Gemma still computes in the type of its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.losses.linear import cross_entropy
from cabochon.models.gemma import Gemma, preset


def step(model: Gemma, batch: TokenBatch, *, autocast: bool, backward_inside: bool) -> list[Tensor]:
    """The loss and all gradients."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = cross_entropy(model(batch), batch).total
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("some_masked", [False, True])
def test_a_training_step_under_autocast_is_the_one_without(
    checkpoint_activations: bool, some_masked: bool
) -> None:
    model = Gemma.init(replace(preset("gemma2-nano"), vocab_size=100), Key(0))
    model.checkpoint_activations = checkpoint_activations
    batch = TokenBatch.of([torch.arange(3, 20), torch.arange(9, 20)])
    if some_masked:
        mask = batch.mask.clone()
        mask[:, ::3] = False
        batch = replace(batch, mask=mask)
    expected = step(model, batch, autocast=False, backward_inside=False)
    for found, wanted in zip(
        step(model, batch, autocast=True, backward_inside=False), expected, strict=True
    ):
        assert found.dtype is torch.float32
        assert torch.equal(found, wanted)


def test_decoding_under_autocast_is_the_one_without() -> None:
    model = Gemma.init(replace(preset("gemma2-nano"), vocab_size=100), Key(0)).eval()
    tokens = torch.arange(3, 9)
    seen = []
    for autocast in (False, True):
        cache = model.new_cache(1, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = model(TokenBatch.of([tokens[:5]]), cache).hidden
            last = replace(TokenBatch.of([tokens[5:]]), positions=torch.tensor([[5]]))
            seen.append((first, model(last, cache).hidden))
    for plain, other in zip(*seen, strict=True):
        assert torch.equal(plain, other)
