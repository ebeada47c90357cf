"""One token for each of several sequences, each from its own distribution and uniform number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.core.errors import NonFinite
from cabochon.generation.sample import Draws, broken_rows, draw
from cabochon.generation.writing import Writing

__all__ = ["by_distribution", "draw_each", "fail"]


def draw_each(logits: Tensor, writings: Sequence[Writing]) -> None:
    """Draw a token for each row of logits and write it; a broken row is its sequence's `failure`.

    Args:
        logits: n V.
        writings: n of them, in the order of the rows.
    """
    for distribution, rows in by_distribution(writings).items():
        whole = len(rows) == len(writings)
        chosen = [writings[row] for row in rows]
        uniforms = [writing.stream()[len(writing.tokens)] for writing in chosen]
        some = logits if whole else logits[torch.tensor(rows)]
        drawn = _drawn(some, uniforms, distribution, chosen)
        columns = (drawn.tokens.tolist(), drawn.logprob.tolist(), drawn.model_logprob.tolist())
        sound = [writing for writing in chosen if writing.failure is None]
        for writing, *values in zip(sound, *columns, strict=True):
            writing.write(*values)


def by_distribution(writings: Sequence[Writing]) -> dict[tuple[float, int, float], list[int]]:
    """The rows of the sequences that draw in the same way."""
    rows: dict[tuple[float, int, float], list[int]] = {}
    for row, writing in enumerate(writings):
        rows.setdefault(writing.settings.distribution, []).append(row)
    return rows


def fail(writing: Writing) -> None:
    """Say that the logits for the next token of a sequence are broken; it gets no more."""
    writing.failure = NonFinite(
        f"the model's logits are NaN, +inf or all -inf for {writing.name}, token "
        f"{len(writing.tokens)}; look for NaN in its weights, or decode in float32"
    )


def _drawn(
    logits: Tensor,
    uniforms: Sequence[float],
    distribution: tuple[float, int, float],
    writings: Sequence[Writing],
) -> Draws:
    """A draw for each row that is sound; the writings of the others get a `failure`."""
    temperature, top_k, top_p = distribution
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    try:
        return draw(logits, numbers, temperature=temperature, top_k=top_k, top_p=top_p)
    except NonFinite:
        for row in broken_rows(logits):
            fail(writings[row])
    sound = [row for row, writing in enumerate(writings) if writing.failure is None]
    return draw(logits[sound], numbers[sound], temperature=temperature, top_k=top_k, top_p=top_p)
