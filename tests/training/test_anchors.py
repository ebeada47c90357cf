"""Anchors: where they are after some updates, in closed form, and after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cabochon.core import Step
from cabochon.core.errors import CheckpointError, ConfigError
from cabochon.training import OptimizerConfig, TrainingState, adamw, checkpoint
from cabochon.training.anchors import Anchor, AnchorConfig, anchor_of
from cabochon.training.precision import float32_weights


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def walk(policy: nn.Module, step: int) -> None:
    """Some update: the same one for the same step."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


def weights(of: nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in of.parameters()]


def step(index: int) -> Step:
    return Step(index=index, loss=0.0, grad_norm=0.0, weight=1.0, learning_rate=0.0, report={})


def walked(
    config: AnchorConfig, updates: int
) -> tuple[Anchor[nn.Module], list[list[torch.Tensor]]]:
    policy = model()
    anchor, path = anchor_of(policy, config), [weights(policy)]

    def updated() -> list[Step]:
        for index in range(updates):
            walk(policy, index)
            path.append(weights(policy))
            yield step(index)

    assert [each.index for each in anchor.following(policy, updated())] == [*range(updates)]
    return anchor, path


def test_a_frozen_anchor_stays_and_has_nothing_to_save() -> None:
    anchor, path = walked(AnchorConfig(), 4)
    assert all(map(torch.equal, weights(anchor.model), path[0]))
    assert anchor.state == {}
    assert not anchor.model.training
    assert not any(each.requires_grad for each in anchor.model.parameters())


def test_the_average_in_closed_form() -> None:
    anchor, path = walked(AnchorConfig(kind="ema", rate=0.25), 6)
    # sum over updates k of (1 - mu)^(t - k) mu theta_k, and what is left of the start
    shares = [0.75**6, *(0.75 ** (6 - k) * 0.25 for k in range(1, 7))]
    for place, found in enumerate(weights(anchor.model)):
        wanted = sum(share * at[place] for share, at in zip(shares, path, strict=True))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("rate", "place"), [(0.0, 0), (1.0, -1)])
def test_the_limits_of_the_rate_are_the_start_and_the_policy(rate: float, place: int) -> None:
    anchor, path = walked(AnchorConfig(kind="ema", rate=rate), 3)
    assert all(map(torch.equal, weights(anchor.model), path[place]))


@pytest.mark.parametrize(("updates", "place"), [(2, 0), (3, 3), (5, 3), (6, 6)])
def test_a_copy_is_taken_every_n_updates(updates: int, place: int) -> None:
    anchor, path = walked(AnchorConfig(kind="copy", every=3), updates)
    assert all(map(torch.equal, weights(anchor.model), path[place]))


def test_small_increments_of_a_bfloat16_policy_are_not_lost() -> None:
    policy = model(torch.bfloat16)
    optimizer = adamw(policy, OptimizerConfig(learning_rate=1e-3))
    anchor = anchor_of(policy, AnchorConfig(kind="ema", rate=0.01))
    begin = {name: each.clone() for name, each in float32_weights(policy).items()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for master in group["params"]:
                master.add_(1e-3)
    for index in range(50):
        anchor.move(policy, index)
    for name, moved in anchor.state.items():
        wanted = begin[name] + (1 - 0.99**50) * 1e-3
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(dict(anchor.model.named_parameters())[name], moved.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_goes_on_from_a_checkpoint_as_if_nothing_had_been(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = AnchorConfig(kind="ema", rate=0.1)

    def life() -> tuple[nn.Module, Anchor[nn.Module], TrainingState]:
        policy = model(dtype)
        anchor = anchor_of(policy, config)

        def save(folder: Path) -> None:
            folder.mkdir()
            save_file(policy.state_dict(), folder / "model.safetensors")

        def load(folder: Path) -> None:
            policy.load_state_dict(load_file(folder / "model.safetensors"))

        optimizer = adamw(policy, OptimizerConfig())
        state = TrainingState(
            save_model=save, load_model=load, optimizer=optimizer, extra=anchor.state
        )
        return policy, anchor, state

    def go_on(policy: nn.Module, anchor: Anchor[nn.Module], begin: int, end: int) -> None:
        def updated() -> list[Step]:
            for index in range(begin, end):
                draw = torch.Generator().manual_seed(index)
                for master in float32_weights(policy).values():
                    master.add_(torch.randn(master.shape, generator=draw))
                yield step(index)

        for _ in anchor.following(policy, updated()):
            pass

    policy, anchor, _ = life()
    go_on(policy, anchor, 0, 7)
    first, first_anchor, first_state = life()
    go_on(first, first_anchor, 0, 4)
    path = checkpoint.write(tmp_path, 4, first_state)
    assert (path / "extra.safetensors").is_file()
    second, second_anchor, second_state = life()
    assert checkpoint.read(path, second_state) == 4
    go_on(second, second_anchor, 4, 7)
    assert all(map(torch.equal, weights(second_anchor.model), weights(anchor.model)))


def test_what_a_checkpoint_carries_must_be_what_the_run_carries(tmp_path: Path) -> None:
    policy = model()
    carried = {"mean": torch.ones(2)}

    def state(extra: dict[str, torch.Tensor]) -> TrainingState:
        return TrainingState(
            save_model=lambda folder: folder.mkdir(), load_model=lambda folder: None,
            optimizer=adamw(policy, OptimizerConfig()), extra=extra,
        )  # fmt: skip

    path = checkpoint.write(tmp_path, 1, state(carried))
    found = {"mean": torch.zeros(2)}
    checkpoint.read(path, state(found))
    assert found["mean"].tolist() == [1.0, 1.0]
    for other in ({}, {"other": torch.ones(2)}, {"mean": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="the algorithm carries now differ in"):
            checkpoint.read(path, state(other))
    assert not (checkpoint.write(tmp_path, 2, state({})) / "extra.safetensors").exists()


def test_what_no_anchor_can_be() -> None:
    with pytest.raises(ConfigError, match=r"rate must lie in \[0, 1\], got 1.5"):
        AnchorConfig(kind="ema", rate=1.5)
    with pytest.raises(ConfigError, match="every 1 or more updates, got 0"):
        AnchorConfig(kind="copy", every=0)
