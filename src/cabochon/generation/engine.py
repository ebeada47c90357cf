"""From prompts to completions: all at once, token by token, or as a sampler.

A sequence has its own streams of uniform numbers, named by the key, the prompt's index and the
sample's index; the n-th number draws the n-th token. So what is written depends neither on the
batch, nor on the slot, nor on the order of arrival, nor on the neighbours (beyond the rounding of
the model's own products).

    for group in generate(model, prompts, Settings(max_new_tokens=64, stop_ids=(1,)), Key(0)): ...
    for token in stream(model, prompt, Settings(temperature=0.7), Key(0)): ...

Prompts that come and go have an `Engine` of their own, see `slots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cabochon.core import Backbone, Group, Key, Sampler
from cabochon.core.errors import ConfigError
from cabochon.generation.limits import for_each
from cabochon.generation.settings import Settings
from cabochon.generation.slots import Engine
from cabochon.generation.writing import Token, Writing, grouped

__all__ = ["Engine", "Settings", "Token", "Writing", "generate", "sampler", "stream"]


def generate(
    model: Backbone,
    prompts: Sequence[Tensor],
    settings: Settings | Sequence[Settings],
    key: Key,
    samples: int = 1,
    *,
    indices: Sequence[int] | None = None,
    rows: int = 64,
    draft: Backbone | None = None,
    ahead: int = 4,
) -> list[Group]:
    """`samples` completions of each prompt, in the prompts' order.

    The model is used as it is now, in evaluation mode and without gradients, and left as it was.

    Args:
        model: what predicts; its cache lives as long as the call.
        prompts: T int64 each, of at least one token; lengths may differ.
        settings: the same for all, or one for each prompt.
        key: the draw of a token depends on (key, prompt index, sample index, position) alone.
        samples: G, completions of each prompt.
        indices: the prompts' indices in the key; 0, 1, 2, ... when absent. Give them to write some
            of a larger list's completions: a rank's share, or a single one again.
        rows: how many sequences are written at a time (memory against speed; the results do not
            depend on it).
        draft: a smaller model that proposes tokens, see `Engine`.
        ahead: how many at a time.

    Returns:
        One group for each prompt, its tensors on the prompt's device.

    Raises:
        ConfigError: `samples` or `rows` below 1, or not as many settings or indices as prompts.
        DataError: an empty prompt, or one that leaves no room in the model's context.
        NonFinite: logits from which nothing can be drawn; names prompt, sample and token. The other
            sequences are written to their ends first: its `finished` has all groups.
    """
    if samples < 1 or rows < 1:
        raise ConfigError(f"samples and rows must be at least 1, got {samples} and {rows}")
    each = for_each(len(prompts), settings, indices)
    lengths = [
        prompt.numel() + how.max_new_tokens for prompt, (_, how) in zip(prompts, each, strict=True)
    ]
    slots = min(rows, max(1, len(prompts) * samples))
    engine = Engine(model, slots=slots, capacity=max([2, *lengths]), draft=draft, ahead=ahead)
    groups: dict[int, tuple[Writing, ...]] = {}
    # Prompts of like length are read side by side with the least padding; no result depends on it.
    for at in sorted(range(len(prompts)), key=lambda at: prompts[at].numel()):
        index, how = each[at]
        groups[at] = engine.add(prompts[at], how, key, index=index, samples=samples)
    while not engine.idle:
        engine.step()
    return grouped(prompts, [groups[at] for at in range(len(prompts))])


def stream(
    model: Backbone,
    prompt: Tensor,
    settings: Settings,
    key: Key,
    *,
    index: int = 0,
    draft: Backbone | None = None,
    ahead: int = 4,
) -> Iterator[Token]:
    """The tokens of one completion, each as soon as it is drawn.

    They are those of `generate` for a prompt of this `index` (its sample 0). Leaving the iterator
    early is how to cancel; between tokens the model is as it was, and may be used or changed.

    Raises:
        DataError: an empty prompt, or one that leaves no room in the model's context.
        NonFinite: logits from which nothing can be drawn; names the position.
    """
    capacity = max(2, prompt.numel() + settings.max_new_tokens)
    engine = Engine(model, slots=1, capacity=capacity, draft=draft, ahead=ahead)
    (writing,) = engine.add(prompt, settings, key, index=index)
    shown = 0
    while not writing.finished:
        engine.step()
        yield from writing.newest(len(writing.tokens) - shown)
        shown = len(writing.tokens)
    if writing.failure is not None:
        raise writing.failure


def sampler(
    model: Backbone,
    settings: Settings,
    samples: int,
    *,
    rows: int = 64,
    draft: Backbone | None = None,
    ahead: int = 4,
) -> Sampler:
    """`generate` with everything but the prompts and the key decided."""

    def sample(prompts: Sequence[Tensor], key: Key, /) -> list[Group]:
        return generate(model, prompts, settings, key, samples, rows=rows, draft=draft, ahead=ahead)

    return sample
