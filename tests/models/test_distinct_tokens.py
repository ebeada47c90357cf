"""Computing what rows have in common once against computing every row by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.losses import cross_entropy
from cabochon.models.gemma import distinct
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.distinct import distinct_tokens

CONFIG = GemmaConfig(
    vocab_size=97, width=24, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=32,
    query_scalar=8, window=20, attention_cap=50.0, final_cap=30.0, post_norms=True, context=256,
)  # fmt: skip


def drawn(seed: int, length: int) -> Tensor:
    return torch.randint(3, 97, (length,), generator=Key(seed).generator())


def samples(prompts: int, count: int, *, prompt: int = 40, longest: int = 40) -> TokenBatch:
    """Prompts with completions of several lengths, of which the tokens count."""
    rows, masks = [], []
    for group in range(prompts):
        begin = drawn(group, prompt)
        for sample in range(count):
            written = drawn(100 + count * group + sample, longest - 5 * sample)
            rows.append(torch.cat([begin, written]))
            masks.append([False] * len(begin) + [True] * len(written))
    return TokenBatch.of(rows, masks=masks)


def learned(model: Gemma, batch: TokenBatch) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients by name."""
    model.zero_grad()
    loss = cross_entropy(model(batch), batch).total
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def plainly(
    model: Gemma, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, dict[str, Tensor]]:
    """The same, every token by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(distinct, "LEAST", 10**9)
        assert distinct_tokens(batch) is None
        return learned(model, batch)


BATCHES = {
    "samples of two prompts": samples(2, 4),
    "samples in another order": (lambda b: TokenBatch(
        **{name: value[[5, 0, 6, 2, 1, 7, 3, 4]] for name, value in vars(b).items()}
    ))(samples(2, 4)),
    "a row and its beginning": TokenBatch.of([drawn(0, 120), drawn(0, 120)[:100]]),
    "the same row": TokenBatch.of([drawn(0, 90)] * 3),
    "padding on the left": TokenBatch.of([drawn(0, 150), drawn(1, 40), drawn(2, 33)], left=True),
    "padding on the right": TokenBatch.of([drawn(0, 150), drawn(1, 40), drawn(2, 33)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_those_of_all_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = Gemma.init(CONFIG, Key(0), torch.float64), BATCHES[name]
    assert distinct_tokens(batch) is not None
    loss, gradients = learned(model, batch)
    expected, wanted = plainly(model, batch, monkeypatch)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)


def test_checkpointed_activations_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Gemma.init(CONFIG, Key(0), torch.float64), samples(2, 4)
    model.checkpoint_activations = True
    found = learned(model, batch)
    torch.testing.assert_close(found, plainly(model, batch, monkeypatch), rtol=1e-9, atol=1e-11)


def test_gradients_of_many_samples_are_summed_in_float32() -> None:
    batch = TokenBatch.of([drawn(0, 32)] * 600)
    found = distinct_tokens(batch)
    assert found is not None
    x = torch.ones(1, 32, 1, dtype=torch.bfloat16, requires_grad=True)
    found.spread(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.float(), torch.full((1, 32, 1), 600.0))


def test_each_prompt_is_one_run_and_each_token_is_itself() -> None:
    batch = samples(3, 4)
    found = distinct_tokens(batch)
    assert found is not None
    # Three prompts of 40, completions of 40, 35, 30 and 25, and the padding of one row: 15.
    assert len(found.places) == 3 * (40 + 40 + 35 + 30 + 25) + 15
    whole = found.spread(found.gather(batch.tokens))
    assert torch.equal(whole, batch.tokens)
    covered = torch.cat([found.places, *(torch.arange(1000)[part] for part, _ in found.repeated)])
    assert torch.equal(covered.sort().values, torch.arange(batch.tokens.numel()))


def test_gather_and_spread_are_transposes_backward() -> None:
    found = distinct_tokens(samples(2, 4))
    assert found is not None
    generator = Key(1).generator()
    x = torch.randn(1, len(found.places), 3, dtype=torch.float64, generator=generator)
    y = torch.randn(*found.shape, 3, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(found.spread, x[:, :, :1].requires_grad_())
    assert torch.autograd.gradcheck(found.gather, y[:, :, :1].requires_grad_())


def test_rows_whose_beginnings_see_other_things_are_left_apart() -> None:
    tokens = torch.stack([drawn(0, 100)] * 4)
    batch = TokenBatch.of(list(tokens))
    assert distinct_tokens(batch) is not None
    # Each row another document boundary at 10: fewer tokens alike than are looked at.
    documents = (torch.arange(100) >= torch.tensor([[10], [11], [12], [13]])).long()
    begin = documents.cumsum(1) - 1
    positions = torch.where(documents == 0, torch.arange(100), begin)
    assert distinct_tokens(replace(batch, documents=documents, positions=positions)) is None
    # Positions that do not begin at 0.
    assert distinct_tokens(replace(batch, positions=batch.positions + 1)) is None


def test_little_in_common_is_not_looked_for() -> None:
    batch = TokenBatch.of([torch.cat([torch.tensor([2]), drawn(row, 99)]) for row in range(8)])
    assert distinct_tokens(batch) is None
    assert distinct_tokens(batch.rows(0, 0)) is None


def test_packed_rows_share_their_first_document(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.stack([torch.cat([drawn(0, 80), drawn(row + 1, 40)]) for row in range(3)])
    place = torch.arange(120).expand(3, 120)
    batch = replace(
        TokenBatch.of(list(tokens)),
        documents=(place >= 80).long(),
        positions=torch.where(place >= 80, place - 80, place),
    )
    found = distinct_tokens(batch)
    assert found is not None
    assert len(found.places) == 80 + 3 * 40
    model = Gemma.init(CONFIG, Key(0), torch.float64)
    loss, gradients = learned(model, batch)
    expected, wanted = plainly(model, batch, monkeypatch)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)
