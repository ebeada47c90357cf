"""The first layer from single frames is the library's convolution of their stacks."""

import pytest
import torch
from torch import nn

from cabochon.models.agents.convolutional import convolutions, convolved
from cabochon.models.agents.pictures import first_layer, has_cells
from cabochon.models.agents.recurrent import Frames


def frames(*, length=6, rows=3, depth=4, size=(1, 36, 36), seed=0):
    draw = torch.Generator().manual_seed(seed)
    shown = torch.randint(0, 256, (length, rows, *size), generator=draw).to(torch.uint8)
    before = torch.randint(0, 256, (rows, depth - 1, *size), generator=draw).to(torch.uint8)
    first = torch.rand(length, rows, generator=draw) < 0.2
    return Frames.of(shown, first, before if depth > 1 else None)


def library(conv, given):
    """The stacks as floats, and torch's own convolution of them."""
    stacks = given.stacked().flatten(0, 1).flatten(1, 2)
    return conv(stacks.float() / 255.0).relu()


CASES = {
    "atari": {},
    "one frame": {"depth": 1},
    "one step": {"length": 1},
    "more steps than frames": {"length": 11, "depth": 2},
    "more rows than share a stack": {"rows": 35},
    "colours": {"size": (3, 36, 36)},
    "an edge that no cell fills": {"size": (1, 38, 43)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution_of_the_stacks_and_so_is_its_gradient(case, bias):
    given = frames(**case)
    torch.manual_seed(1)
    inputs = given.seen.shape[2] * given.every.shape[2]
    conv = nn.Conv2d(inputs, 5, (8, 4), 4, bias=bias)
    ours, theirs = first_layer(conv, given), library(conv, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # Where the sum is all but zero, one may pass a gradient and the other not: it is not counted.
    factor = torch.randn(theirs.shape) * ((theirs == 0) == (ours == 0))
    parameters = list(conv.parameters())
    for mine, library_s in zip(
        torch.autograd.grad((ours * factor).sum(), parameters),
        torch.autograd.grad((theirs * factor).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, library_s, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["impala_small", "nature", "impala_deep"])
def test_a_torso_says_of_frames_what_its_layers_say_of_stacks(kind):
    given = frames(length=3, size=(1, 44, 44))
    torso = convolutions(kind, (4, 44, 44), 16)
    stacks = given.stacked().flatten(0, 1).flatten(1, 2)
    torch.testing.assert_close(
        convolved(torso, given), torso(stacks.float() / 255.0), rtol=1e-4, atol=1e-5
    )


def test_other_convolutions_are_left_to_the_library():
    shown = frames().every
    assert has_cells(nn.Conv2d(4, 8, 8, 4), shown)
    for other in (
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(4, 8, 6, 4),
        nn.Conv2d(4, 8, 8, 4, padding=2),
        nn.Conv2d(4, 8, 8, 4, groups=2),
        nn.Conv2d(4, 8, 8, 4).double(),
        nn.Linear(4, 8),
    ):
        assert not has_cells(other, shown)
    assert not has_cells(nn.Conv2d(4, 8, 8, 4), shown.to("meta"))
    with torch.autocast("cpu"):
        assert not has_cells(nn.Conv2d(4, 8, 8, 4), shown)
