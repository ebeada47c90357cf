from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from cabochon.core import Loss, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.training import finish, fit

EXACT = 1e-12
"""Float64: what is left is the order of additions."""

V, D = 11, 6


class Bigram(nn.Module):
    """Next-token logits from the present token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.head = nn.Linear(D, V)
        self.double()

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.head(torch.tanh(self.embedding(batch.tokens)))


def cross_entropy(model: nn.Module, batch: TokenBatch) -> Loss:
    logprob = model(batch).log_softmax(-1)
    nll = -logprob.gather(-1, batch.targets[..., None]).squeeze(-1)
    counted = nll[batch.mask]
    return Loss(
        total=counted.sum(),
        weight=batch.mask.sum(),
        report={"squares": counted.detach().square().sum()},
    )


def ragged(rows: int = 12, longest: int = 9) -> TokenBatch:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, longest, (rows,), generator=generator).tolist()
    sequences = [torch.randint(V, (n,), generator=generator) for n in lengths]
    masks = [(torch.rand(n, generator=generator) < 0.6).tolist() for n in lengths]
    return TokenBatch.of(sequences, masks=masks)


def sgd(model: nn.Module, lr: float = 0.3) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def fresh() -> Bigram:
    torch.manual_seed(3)
    return Bigram()


def split(batch: TokenBatch, cuts: list[int]) -> list[TokenBatch]:
    ends = [*cuts, batch.shape[0]]
    return [batch.rows(a, b) for a, b in zip([0, *cuts], ends, strict=True)]


@pytest.mark.parametrize("cuts", [[6], [1], [11], [1, 2, 7], list(range(1, 12))])
def test_no_split_into_micro_batches_changes_the_update(cuts: list[int]) -> None:
    batch = ragged()
    whole, parts = fresh(), fresh()
    (one,) = fit(whole, cross_entropy, [batch], sgd(whole))
    (many,) = fit(parts, cross_entropy, split(batch, cuts), sgd(parts), accumulate=len(cuts) + 1)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
    assert many.weight == one.weight == batch.mask.sum().item()
    assert many.loss == pytest.approx(one.loss, abs=EXACT)
    assert many.grad_norm == pytest.approx(one.grad_norm, abs=EXACT)
    assert many.report["squares"] == pytest.approx(one.report["squares"], abs=EXACT)


def test_an_update_is_the_mean_over_all_units_and_not_the_mean_of_means() -> None:
    """Two micro-batches of 1 and 3 numbers: d/dw of mean (w - x)^2 at 0 is -2 mean(x) = -2 * 4."""

    def squares(model: nn.Linear, batch: Tensor) -> Loss:
        return Loss(total=(model.weight - batch).square().sum(), weight=torch.tensor(len(batch)))

    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batches = [torch.tensor([10.0]), torch.tensor([1.0, 2.0, 3.0])]
    (step,) = fit(model, squares, batches, sgd(model, 0.5), accumulate=2, max_grad_norm=math.inf)
    assert model.weight.item() == pytest.approx(0.5 * 2 * 4.0)
    assert step.grad_norm == pytest.approx(8.0)
    assert step.loss == pytest.approx((100 + 1 + 4 + 9) / 4)
    assert step.weight == 4.0


def test_a_long_mean_gradient_is_shortened_to_the_norm_and_a_short_one_left_alone() -> None:
    batch = ragged()
    for limit in (1e-3, 1e3):
        model = fresh()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        (step,) = fit(model, cross_entropy, [batch], sgd(model, 1.0), max_grad_norm=limit)
        moved = nn.utils.parameters_to_vector(model.parameters()) - before
        assert moved.norm().item() == pytest.approx(min(limit, step.grad_norm), rel=1e-9)


def test_batches_are_pulled_after_the_update_before_and_see_its_weights() -> None:
    model = fresh()
    seen: list[Tensor] = []
    events: list[str] = []

    def batches() -> Iterator[TokenBatch]:
        while True:
            seen.append(model.head.weight.detach().clone())
            events.append("pull")
            yield ragged(4)

    after: list[Tensor] = []
    for step in islice(fit(model, cross_entropy, batches(), sgd(model), accumulate=2), 3):
        events.append(f"step {step.index}")
        after.append(model.head.weight.detach().clone())
    assert events == ["pull", "pull", "step 0", "pull", "pull", "step 1", "pull", "pull", "step 2"]
    for i in (1, 2):
        assert torch.equal(seen[2 * i], after[i - 1])
        assert torch.equal(seen[2 * i + 1], after[i - 1])
        assert not torch.equal(after[i], after[i - 1])


def test_nothing_happens_before_the_first_step_is_asked_for() -> None:
    model = fresh()
    pulled: list[int] = []
    steps = fit(model, cross_entropy, (pulled.append(i) or ragged() for i in range(2)), sgd(model))
    assert pulled == []
    next(steps)
    assert pulled == [0]


def test_batches_that_end_early_make_one_last_update_of_what_there_is() -> None:
    batch = ragged()
    model, whole = fresh(), fresh()
    steps = list(fit(model, cross_entropy, split(batch, [5, 8]), sgd(model), accumulate=2))
    expected = list(fit(whole, cross_entropy, split(batch, [8]), sgd(whole)))
    assert [s.index for s in steps] == [0, 1]
    assert [s.weight for s in steps] == [s.weight for s in expected]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_no_batches_make_no_update() -> None:
    model = fresh()
    assert list(fit(model, cross_entropy, [], sgd(model))) == []
    assert finish(fit(model, cross_entropy, [], sgd(model))) is None


def test_finish_runs_to_the_end_and_gives_the_last_step() -> None:
    model = fresh()
    last = finish(fit(model, cross_entropy, [ragged()] * 3, sgd(model)))
    assert last is not None
    assert last.index == 2


def test_the_learning_rate_is_the_initial_one_times_the_schedule_of_the_update() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.head.weight], "lr": 0.5},
            {"params": [model.head.bias, model.embedding.weight]},
        ],
        lr=0.1,
    )
    schedule = {3: 1.0, 4: 0.5, 5: 0.25}.__getitem__
    steps = fit(model, cross_entropy, [ragged()] * 3, optimizer, schedule=schedule, start=3)
    rates = [[step.learning_rate, optimizer.param_groups[1]["lr"]] for step in steps]
    assert rates == [[0.5, 0.1], [0.25, 0.05], [0.125, 0.025]]


def test_starting_in_the_middle_continues_as_if_never_interrupted() -> None:
    def batches(start: int) -> Iterator[TokenBatch]:
        for i in range(start, 6):
            yield ragged(3 + i)

    def schedule(index: int) -> float:
        return 1 / (1 + index)

    whole, parts = fresh(), fresh()
    steps = list(fit(whole, cross_entropy, batches(0), sgd(whole), schedule=schedule))
    optimizer = sgd(parts)
    first = list(islice(fit(parts, cross_entropy, batches(0), optimizer, schedule=schedule), 2))
    rest = list(fit(parts, cross_entropy, batches(2), optimizer, schedule=schedule, start=2))
    assert first + rest == steps
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_non_finite_loss_names_update_micro_batch_and_rows_and_leaves_the_weights() -> None:
    model = fresh()
    good = ragged(6)
    bad = TokenBatch(**{name: value.clone() for name, value in vars(good).items()})
    poison = V - 1
    bad.tokens[bad.tokens == poison] = 0
    bad.tokens[[2, 4], 0] = poison
    bad.mask[[2, 4], 0] = True
    clean = TokenBatch(**{name: value.clone() for name, value in vars(bad).items()})
    clean.tokens[[2, 4], 0] = 0

    def objective(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = cross_entropy(model, batch)
        broken = torch.where((batch.tokens == poison).any(), math.nan, 0.0)
        return Loss(total=loss.total + broken, weight=loss.weight)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    steps = fit(model, objective, [clean, clean, clean, bad], optimizer, accumulate=2, start=7)
    next(steps)
    before = [p.detach().clone() for p in model.parameters()]
    state = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    with pytest.raises(NonFinite, match=r"update 8: the loss of micro-batch 1, rows 2, 4 is nan"):
        next(steps)
    for p, was, average in zip(model.parameters(), before, state, strict=True):
        assert torch.equal(p, was)
        assert torch.equal(optimizer.state[p]["exp_avg"], average)


def test_a_finite_loss_with_a_non_finite_gradient_names_micro_batch_and_parameter() -> None:
    """sqrt has the value 0 and an infinite slope at 0."""

    def root(model: nn.Linear, batch: Tensor) -> Loss:
        return Loss(total=model(batch).abs().sqrt().sum(), weight=torch.tensor(len(batch)))

    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    batches = [torch.ones(4, 3), torch.zeros(4, 3)]
    with pytest.raises(NonFinite, match=r"update 0: the gradient of micro-batch 1 .* in weight"):
        next(fit(model, root, batches, optimizer, accumulate=2))
    assert torch.equal(model.weight, before)


def test_an_update_in_which_nothing_counts_is_refused() -> None:
    model = fresh()
    batch = ragged()
    batch.mask.zero_()
    with pytest.raises(DataError, match="update 4: not a single unit counts in its 2 micro"):
        next(fit(model, cross_entropy, [batch, batch], sgd(model), accumulate=2, start=4))


def test_a_micro_batch_in_which_nothing_counts_is_no_harm_beside_one_that_does() -> None:
    batch, empty = ragged(), ragged(3)
    empty.mask.zero_()
    alone, both = fresh(), fresh()
    (a,) = fit(alone, cross_entropy, [batch], sgd(alone))
    (b,) = fit(both, cross_entropy, [empty, batch], sgd(both), accumulate=2)
    assert a == b
    assert torch.equal(alone.head.weight, both.head.weight)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter of the optimizer received a gradient"):
        next(fit(fresh(), cross_entropy, [ragged()], sgd(fresh())))


def test_bfloat16_parameters_without_masters_are_refused() -> None:
    model = nn.Linear(2, 2).bfloat16()
    with pytest.raises(ConfigError, match="float32 masters"):
        fit(model, cross_entropy, [], sgd(model))


@pytest.mark.parametrize(
    "wrong", [{"accumulate": 0}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan}, {"start": -1}]
)
def test_arguments_out_of_range_are_refused_at_once(wrong: dict[str, float]) -> None:
    model = fresh()
    with pytest.raises(ConfigError, match="fit needs"):
        fit(model, cross_entropy, [], sgd(model), **wrong)  # type: ignore[arg-type]


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_is_pulled() -> None:
    import gc
    import weakref

    model = fresh()
    graphs: list[weakref.ref[Tensor]] = []

    class Remember(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = torch.ones(3)  # as hand-written backward passes keep their buffers
            graphs.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def objective(model: nn.Module, batch: TokenBatch) -> Loss:
        loss = cross_entropy(model, batch)
        return Loss(total=Remember.apply(loss.total), weight=loss.weight)

    def batches() -> Iterator[TokenBatch]:
        for _ in range(4):
            gc.collect()
            assert all(graph() is None for graph in graphs)
            yield ragged()

    assert len(list(fit(model, objective, batches(), sgd(model), accumulate=2))) == 2
    assert len(graphs) == 4
