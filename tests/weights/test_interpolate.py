"""Merges of tensors in memory against float64, torch's own averages, and WARP's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from cabochon.core.errors import ConfigError, NonFinite, WeightsMismatch
from cabochon.weights.interpolate import average, lerp, slerp, task_vectors, towards

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {
    "embed.weight": (7, 4), "layers.0.a.weight": (4, 4), "layers.0.b": (4,),
    "layers.1.a.weight": (4, 4), "layers.1.b": (4,),
}  # fmt: skip


def model(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: (scale * torch.randn(s, generator=generator)).to(dtype) for n, s in NAMES.items()}


def near(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    moved = model(seed, scale=0.05)
    return {name: (base[name].float() + moved[name]).to(base[name].dtype) for name in base}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_is_the_float64_one_rounded_once(dtype: torch.dtype) -> None:
    models, weights = [model(seed, dtype) for seed in range(3)], [0.2, 0.5, 0.3]
    result = average(models, weights)
    for name in NAMES:
        exact = sum(w * m[name].double() for w, m in zip(weights, models, strict=True))
        assert torch.equal(result[name], exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_model_averaged_with_itself_is_itself(dtype: torch.dtype, count: int) -> None:
    one = model(0, dtype)
    assert same(average([one] * count), one)


def test_the_mean_is_that_of_torch_averaged_model() -> None:
    nets = [torch.nn.Linear(5, 3) for _ in range(4)]
    averaged = AveragedModel(nets[0])
    for net in nets:
        averaged.update_parameters(net)
    ours = average([dict(net.state_dict()) for net in nets])
    torch.testing.assert_close(ours["weight"], averaged.module.weight.data, rtol=0, atol=1e-7)


@given(order=st.permutations(range(4)))
def test_the_order_of_averaged_models_does_not_matter(order: list[int]) -> None:
    models = [model(seed) for seed in range(4)]
    assert same(average([models[i] for i in order]), average(models))


def test_the_average_of_linear_models_is_the_average_of_their_outputs() -> None:
    """WARM on frozen features: one averaged head scores as the ensemble."""
    x, heads = torch.randn(9, 4, dtype=torch.float64), [model(s)["layers.0.b"] for s in range(3)]
    merged = average([{"w": head.double()} for head in heads])["w"]
    ensemble = torch.stack([x @ head.double() for head in heads]).mean(0)
    torch.testing.assert_close(x @ merged, ensemble)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_every_path_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    base = model(0, dtype)
    a, b = near(base, 1), near(base, 2)
    a["layers.0.b"][0] = -0.0
    assert same(lerp(a, b, 0.0), a)
    assert same(lerp(a, b, 1.0), b)
    assert math.copysign(1, lerp(a, b, 0.0)["layers.0.b"][0].item()) == -1
    assert same(towards(base, a, 1.0), a)
    assert same(towards(base, a, 0.0), base)
    for mean in ("recursion", "symmetric"):
        assert same(slerp(base, [a, b], [1.0, 0.0], mean=mean), a)
        assert same(slerp(base, [a, b], [0.0, 1.0], mean=mean), b)


@pytest.mark.parametrize("per", ["tensor", "block", "whole"])
def test_slerp_is_the_formula_of_the_paper_in_float64(per: str) -> None:
    base = model(0)
    a, b = near(base, 1), near(base, 2)
    t, result = 0.3, slerp(base, [a, b], [0.7, 0.3], per=per)
    blocks = {
        "tensor": [[name] for name in NAMES],
        "block": [["embed.weight"], *([f"layers.{i}.a.weight", f"layers.{i}.b"] for i in (0, 1))],
        "whole": [list(NAMES)],
    }[per]
    for names in blocks:
        da = torch.cat([(a[n].double() - base[n].double()).flatten() for n in names])
        db = torch.cat([(b[n].double() - base[n].double()).flatten() for n in names])
        angle = torch.acos(da @ db / (da.norm() * db.norm()))
        exact = (torch.sin((1 - t) * angle) * da + torch.sin(t * angle) * db) / torch.sin(angle)
        exact += torch.cat([base[n].double().flatten() for n in names])
        ours = torch.cat([result[n].flatten() for n in names])
        assert torch.equal(ours, exact.float())


def test_task_vectors_keep_their_length_and_an_average_loses_it() -> None:
    base = {"w": torch.zeros(1000)}
    models = [{"w": v / v.norm()} for v in torch.linalg.qr(torch.randn(1000, 4))[0].T]
    assert slerp(base, models)["w"].norm().item() == pytest.approx(1, abs=1e-6)
    assert slerp(base, models, mean="symmetric")["w"].norm().item() == pytest.approx(1, abs=1e-6)
    assert average(models)["w"].norm().item() == pytest.approx(0.5, abs=1e-6)


def test_what_no_model_moved_stays_as_it_was_bit_for_bit() -> None:
    base = model(0)
    a, b = near(base, 1), near(base, 2)
    for each in (a, b):
        each["embed.weight"] = base["embed.weight"].clone()
    for per in ("tensor", "block", "whole"):
        result = slerp(base, [a, b], [0.1, 0.9], per=per)
        assert torch.equal(result["embed.weight"], base["embed.weight"])


def test_moving_back_commutes_with_averaging() -> None:
    start = {name: tensor.double() for name, tensor in model(0).items()}
    a, b = ({n: t.double() for n, t in near(model(0), s).items()} for s in (1, 2))
    one = towards(start, average([a, b]), 0.3)
    two = average([towards(start, a, 0.3), towards(start, b, 0.3)])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-14, atol=1e-14)


def test_tensors_that_share_memory_count_once_in_an_angle() -> None:
    def tied(seed: int) -> dict[str, Tensor]:
        one = model(seed)
        return {**one, "lm_head.weight": one["embed.weight"]}

    base, a, b = tied(0), tied(1), tied(2)
    plain = [{n: t for n, t in each.items() if n != "lm_head.weight"} for each in (base, a, b)]
    one, two = slerp(base, [a, b], per="whole"), slerp(plain[0], plain[1:], per="whole")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert torch.equal(one["lm_head.weight"], one["embed.weight"])
    found = task_vectors(base, [a, b], "whole")["all"]
    assert found.elements == sum(tensor.numel() for tensor in plain[0].values())


def test_the_report_of_angles_is_that_of_the_vectors() -> None:
    base = model(0)
    a, b = near(base, 1), near(base, 2)
    found = task_vectors(base, [a, b], "block")
    assert list(found) == ["embed.weight", "layers.0", "layers.1"]
    da, db = (
        torch.cat([(m[n].double() - base[n]).flatten() for n in NAMES if n.startswith("layers.1")])
        for m in (a, b)
    )
    assert found["layers.1"].norms == pytest.approx([da.norm().item(), db.norm().item()])
    cosine = (da @ db / da.norm() / db.norm()).item()
    assert found["layers.1"].cosines[0, 1] == pytest.approx(cosine)


def test_whole_numbers_must_agree_and_are_kept() -> None:
    a, b = model(0), model(1)
    a["steps"] = b["steps"] = torch.tensor([3, 4])
    assert average([a, b])["steps"].tolist() == [3, 4]
    assert slerp(a, [b, {**model(3), "steps": a["steps"]}])["steps"].tolist() == [3, 4]
    b["steps"] = torch.tensor([3, 5])
    with pytest.raises(WeightsMismatch, match=r"steps is of type torch\.int64"):
        average([a, b])


def test_other_names_shapes_and_numbers_are_refused_by_name() -> None:
    a, b = model(0), model(1)
    with pytest.raises(WeightsMismatch, match="extra"):
        average([a, {**b, "extra": torch.zeros(1)}])
    with pytest.raises(WeightsMismatch, match=r"layers\.0\.b has shape"):
        average([a, {**b, "layers.0.b": torch.zeros(5)}])
    broken = {**b, "layers.0.b": torch.tensor([1.0, math.nan, 0, 0])}
    for merge in (
        lambda: average([a, broken]), lambda: slerp(a, [b, broken]), lambda: slerp(broken, [a, b]),
        lambda: task_vectors(a, [broken]), lambda: towards(broken, a, 0.5),
    ):  # fmt: skip
        with pytest.raises(NonFinite, match=r"layers\.0\.b"):
            merge()
    with pytest.raises(ConfigError, match="t must lie"):
        lerp(a, b, 1.5)
    with pytest.raises(ConfigError, match="eta must lie"):
        towards(a, b, math.nan)


def test_a_number_that_the_type_cannot_hold_is_an_error_not_an_infinity() -> None:
    """Orthogonal task vectors at the largest float16: the arc's middle is 1.41 halves of each."""
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    a = {"w": torch.tensor([65504.0, 0.1], dtype=torch.float16)}
    b = {"w": torch.tensor([65504.0, -65504.0], dtype=torch.float16)}
    with pytest.raises(NonFinite, match="too large"):
        slerp(base, [a, b])
