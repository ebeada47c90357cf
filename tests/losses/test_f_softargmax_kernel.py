"""The Triton kernel gives the numbers of the torch path: on a GPU, else through the interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from cabochon.losses.f_divergences import KL, Alpha, ChiSquare, Jeffreys, SquaredHellinger
from cabochon.losses.f_softargmax import Task, _kernel_order, f_softargmax, f_softmax

CHECK = """
import torch
from cabochon.losses import f_softargmax as module
from cabochon.losses.f_divergences import KL, Alpha, ChiSquare, ReverseKL, SquaredHellinger

device = "cuda" if torch.cuda.is_available() else "cpu"
rows = 2.0 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
rows[1, 7] = -float("inf")
rows[2] *= 5.0
fs = [KL(), ReverseKL(), ChiSquare(), SquaredHellinger(), Alpha(1.5), Alpha(1.25), Alpha(-1.0)]
for f in fs:
    for q in (1.0, 1.0 / 5000):
        for temperature in (1.0, 0.5):
            task = module.Task(f, rows.to(device), q, temperature, True)
            found = module._solve_by_kernel(task, *module._kernel_order(task))
            exact = module.solve(module.Task(f, rows.double(), q, temperature, True))
            assert (found.prob.cpu() - exact.prob).abs().max() < 1e-6, (f, q)
            assert (found.prob.double().sum(-1) - 1.0).abs().max() < 1e-6
            wrong = (found.level.cpu() - exact.level).abs() / (1.0 + exact.level.abs())
            assert wrong.max() < 1e-4, (f, q, wrong)
"""


def test_the_kernel_gives_the_numbers_of_the_torch_path() -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, PYTHONWARNINGS="ignore")
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_only_what_the_kernel_can_do_exactly_goes_to_it() -> None:
    pytest.importorskip("triton")
    rows = torch.zeros(2, 5)
    for f, order in (
        (KL(), (1.0, 1.0)), (ChiSquare(), (2.0, 1.0)), (SquaredHellinger(), (0.5, 2.0)),
        (Alpha(1.5), (1.5, 1.0)), (Alpha(1.05), None), (Alpha(3.0), None), (Jeffreys(), None),
    ):  # fmt: skip
        assert _kernel_order(Task(f, rows, 1.0, 1.0, False)) == order
        assert _kernel_order(Task(f, rows, torch.ones(5), 1.0, False)) is None
        assert _kernel_order(Task(f, rows.double(), 1.0, 1.0, False)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu() -> None:
    logits = 4.0 * torch.randn(4, 262_144, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = -math.inf
    for f in (KL(), ChiSquare(), Alpha(1.5), SquaredHellinger(), Alpha(1.05), Jeffreys()):
        for operator in (f_softargmax, f_softmax):
            found, exact = operator(f, logits.cuda()).cpu(), operator(f, logits)
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
