from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cabochon.core.errors import ConfigError, WeightsMismatch
from cabochon.weights.ema import ema


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator).to(dtype),
        "b.c": torch.randn(4, generator=generator).to(dtype),
    }


def test_two_averages_by_hand() -> None:
    average = {"w": torch.tensor([1.0, 0.0])}
    average = ema(average, {"w": torch.tensor([3.0, 8.0])}, 0.75)
    assert average["w"].tolist() == [1.5, 2.0]
    average = ema(average, {"w": torch.tensor([3.5, 2.0])}, 0.75)
    assert average["w"].tolist() == [2.0, 2.0]


@given(decay=st.floats(0, 1))
def test_averaging_weights_with_themselves_changes_nothing(decay: float) -> None:
    w = weights(0)
    result = ema(w, w, decay)
    assert all(torch.equal(result[name], w[name]) for name in w)


def test_decay_0_is_the_weights_and_1_the_average_so_far() -> None:
    old, new = weights(0), weights(1)
    assert torch.equal(ema(old, new, 0.0)["a"], new["a"])
    assert torch.equal(ema(old, new, 1.0)["a"], old["a"])


def test_n_updates_weigh_the_past_geometrically() -> None:
    """average_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i, in float64."""
    decay, n = 0.9, 20
    average = weights(0)
    for i in range(1, n + 1):
        average = ema(average, weights(i), decay)
    exact = decay**n * weights(0)["a"].double()
    for i in range(1, n + 1):
        exact += (1 - decay) * decay ** (n - i) * weights(i)["a"].double()
    torch.testing.assert_close(average["a"].double(), exact, rtol=0, atol=1e-6)


def test_short_types_are_averaged_in_float32_so_that_slow_averages_still_move() -> None:
    one = {"w": torch.ones(1, dtype=torch.bfloat16)}
    average = ema(one, {"w": torch.full((1,), 2.0, dtype=torch.bfloat16)}, 0.9999)
    assert average["w"].dtype is torch.float32
    assert average["w"].item() == pytest.approx(1.0001, abs=1e-7)


def test_it_is_pure_unless_given_where_to_write() -> None:
    old, new = weights(0), weights(1)
    before = {name: tensor.clone() for name, tensor in old.items()}
    fresh = ema(old, new, 0.5)
    assert all(torch.equal(old[name], before[name]) for name in old)
    place = old["a"].data_ptr()
    written = ema(old, new, 0.5, out=old)
    assert written is old
    assert old["a"].data_ptr() == place
    assert all(torch.equal(old[name], fresh[name]) for name in old)


def test_other_names_or_shapes_are_refused_by_name() -> None:
    with pytest.raises(WeightsMismatch, match=r"b\.c"):
        ema(weights(0), {"a": weights(0)["a"]}, 0.5)
    with pytest.raises(WeightsMismatch, match=r"a has shape \(5, 3\)"):
        ema(weights(0), {**weights(0), "a": torch.zeros(5, 3)}, 0.5)


def test_a_decay_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.1"):
        ema(weights(0), weights(0), 1.1)
