"""The gradient of every weight against transformers' eager models, through the chunked loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hf_gemma import SHAPES, hf_folder, random_rows

from cabochon.core import TokenBatch
from cabochon.losses import cross_entropy
from cabochon.models.gemma.convert import hf_tensors, read_gemma

CLOSE = 2e-5  # float32, of the largest gradient of a tensor


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_the_loss_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = hf_folder(tmp_path, name)
    ours = read_gemma(tmp_path)
    (tokens,) = random_rows(23)
    batch = TokenBatch.of([tokens])
    loss = cross_entropy(ours(batch), batch, chunk=5)
    expected = theirs(input_ids=tokens[None], labels=tokens[None]).loss
    torch.testing.assert_close(loss.total / loss.weight, expected, rtol=1e-5, atol=0)
    (loss.total / loss.weight).backward()
    expected.backward()
    wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
    as_weights = copy.deepcopy(ours)
    for weight, own in zip(as_weights.parameters(), ours.parameters(), strict=True):
        weight.data = own.grad
    found = dict(hf_tensors(as_weights))
    assert found.keys() == wanted.keys()
    for part, gradient in wanted.items():
        largest = gradient.abs().max()
        torch.testing.assert_close(
            found[part], gradient, rtol=0, atol=CLOSE * largest.item(), msg=lambda m, p=part: p + m
        )
