from __future__ import annotations

import pytest
import torch
from torch import nn

from cabochon.core.errors import ConfigError
from cabochon.training import OptimizerConfig, adamw


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(7, 4)
        self.embedding = nn.Parameter(torch.randn(7, 4))
        self.matrix = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)


def test_decay_touches_matrices_and_neither_norms_biases_nor_embeddings() -> None:
    """With no gradient signal the update is the decay alone: w (1 - rate * decay)."""
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrink = 1 - 0.1 * 0.5 if name == "matrix.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrink, msg=name)


def test_two_steps_by_the_paper_in_float64() -> None:
    """Algorithm 2 of Loshchilov and Hutter, with bias correction, on one number."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    config = OptimizerConfig(learning_rate=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.25)
    optimizer = adamw(model, config)
    weight, mean, square = 2.0, 0.0, 0.0
    for t, gradient in enumerate((3.0, -1.0), start=1):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        slope = (mean / (1 - 0.8**t)) / ((square / (1 - 0.9**t)) ** 0.5 + 1e-3)
        weight -= 0.1 * (slope + 0.25 * weight)
        assert model.weight.item() == pytest.approx(weight, rel=1e-12)


def test_the_fused_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        model = nn.Linear(333, 1001)
        optimizer = adamw(model, OptimizerConfig())
        for i in range(3):
            for parameter in model.parameters():
                wave = torch.arange(parameter.numel()) * (i + 1.0)
                parameter.grad = torch.sin(wave).view_as(parameter)
            optimizer.step()
        found.append(model.weight.detach().clone())
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_which_parameters_decay_can_be_chosen_by_name() -> None:
    optimizer = adamw(Net(), OptimizerConfig(), decays=lambda name, _: name == "norm.bias")
    decayed, kept = optimizer.param_groups
    assert decayed["param_names"] == ["norm.bias"]
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert "frozen" not in kept["param_names"]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="requires a gradient"):
        adamw(Net().requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}],
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
