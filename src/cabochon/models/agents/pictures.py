"""The first convolution of an agent that sees pictures, from the bytes of single frames.

The floats of all stacked pictures of an unroll are 4 k times the bytes that were seen: on a CPU to
make them, and to read them twice, takes longer than all of the network's arithmetic. Here there is
one stack for a few environments, small enough for the caches. From one step to the next only the
oldest of its k frames is overwritten, in place, by the newest one; not the frames move on, but the
weights, which are few, turn with them. The gradient goes through the bytes once more in the same
way, so that no floats of pictures are kept.

A convolution of 8 x 8 in steps of 4 is one of 2 x 2 in steps of 1 over cells: 4 x 4 pixels that lie
side by side in memory. A stack of k frames has 16 k channels then, which is what libraries of
convolutions are quickest with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cabochon.models.agents.recurrent import Frames

__all__ = ["CELL", "first_layer", "has_cells"]

CELL = 4
"""Pixels by which a cell is high and wide; four bytes in a row are copied as one number."""
_ROWS = 32
"""Environments that share a stack: 3.6 MB with 4 frames of 84 x 84."""


def has_cells(conv: nn.Module, frames: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether `first_layer` takes this convolution of these frames, and gains by it."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.stride == (CELL, CELL)
        and all(size % CELL == 0 for size in conv.kernel_size)
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        and conv.weight.dtype == torch.float32
        and frames.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def first_layer(conv: nn.Conv2d, frames: Frames) -> Tensor:
    """relu(conv(stacked / 255)), T*B O h w with channels last.

    Args:
        conv: k*C channels to O, in steps of `CELL`, with a kernel of whole cells.
        frames: k-1+T B C H W bytes.
    """
    outputs, inputs, height, width = conv.weight.shape
    depth = frames.seen.shape[2]
    by_cell = conv.weight.view(
        outputs, depth, inputs // depth, height // CELL, CELL, width // CELL, CELL
    )
    weight = by_cell.permute(0, 1, 2, 4, 6, 3, 5).flatten(2, 4) / 255.0  # O k C*16 Y X
    bias = weight.new_zeros(outputs) if conv.bias is None else conv.bias
    layer: Tensor = _FirstLayer.apply(frames.every, frames.seen, weight, bias)
    return layer.flatten(0, 1).movedim(-1, 1)


class _FirstLayer(torch.autograd.Function):
    """relu(conv(stacked)), T B h w O, of bytes, of what is seen of them, and of weights by cell."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, seen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        times, _, depth = seen.shape
        turned = [_turned(weight, time) for time in range(min(times, depth))]
        layer = weight.new_empty(*seen.shape[:2], *_sizes(every, weight), len(weight))
        for time, rows, stack in _stacks(every, seen):
            convolved = nn.functional.conv2d(stack, turned[time % depth], bias)
            torch.clamp_min(convolved.movedim(1, -1), 0.0, out=layer[time, rows])
        ctx.save_for_backward(every, seen, weight, layer)
        return layer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor]:
        every, seen, weight, layer = ctx.saved_tensors
        times, _, depth = seen.shape
        turned = [_turned(weight, time) for time in range(min(times, depth))]
        by_turned = [torch.zeros_like(each) for each in turned]
        by_bias = weight.new_zeros(len(weight))
        for time, rows, stack in _stacks(every, seen):
            passed = torch.ops.aten.threshold_backward(grad[time, rows], layer[time, rows], 0.0)
            _, by_weight, of_bias = torch.ops.aten.convolution_backward(
                passed.movedim(-1, 1), stack, turned[0], by_bias.shape,
                (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, True),
            )  # fmt: skip
            by_turned[time % depth] += by_weight
            by_bias += of_bias
        back = [
            each.unflatten(1, weight.shape[1:3]).roll(-time, 1)
            for time, each in enumerate(by_turned)
        ]
        return None, None, torch.stack(back).sum(0), by_bias


def _sizes(every: Tensor, weight: Tensor) -> tuple[int, int]:
    """How high and wide the layer is."""
    height, width = (
        every.shape[-2 + axis] // CELL - weight.shape[-2 + axis] + 1 for axis in (0, 1)
    )
    return height, width


def _turned(weight: Tensor, time: int) -> Tensor:
    """O k*C*16 Y X: the weights (O k C*16 Y X, oldest frame first) for the stack of this time."""
    turned = weight.roll(time, 1).flatten(1, 2)
    return turned.contiguous(memory_format=torch.channels_last)


def _stacks(every: Tensor, seen: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(time, rows, their stack): n k*C*16 H/4 W/4 floats, channels last, good until the next.

    Frame number i of `every` stands in place i % k, zeros where it is not seen.
    """
    times, count, depth = seen.shape
    hidden: dict[int, list[tuple[int, int]]] = {}
    for time, row, place in (~seen).nonzero().tolist():
        hidden.setdefault(time, []).append((row, (time + place) % depth))
    for begin in range(0, count, _ROWS):
        rows = slice(begin, min(begin + _ROWS, count))
        stack = _cells(every[:depth, rows]).float()
        for time in range(times):
            if time:
                newest = _cells(every[time + depth - 1, rows].unsqueeze(0))
                stack[:, :, :, (time - 1) % depth] = newest.squeeze(3)
            for row, place in hidden.get(time, ()):
                if begin <= row < rows.stop:
                    stack[row - begin, :, :, place] = 0.0
            yield time, rows, stack.flatten(3).movedim(-1, 1)


def _cells(frames: Tensor) -> Tensor:
    """k n C H W bytes to n H/4 W/4 k C*16: channel by channel, the pixels of each cell."""
    height, width = (size // CELL for size in frames.shape[-2:])
    # A convolution without padding sees nothing of a last cell that is not whole.
    whole = frames[..., : height * CELL, : width * CELL].contiguous().view(torch.int32)
    lines = whole.unflatten(3, (height, CELL))  # k n C H/4 y W/4, each of four pixels
    cells: Tensor = lines.permute(1, 3, 5, 0, 2, 4).contiguous()
    return cells.flatten(4).view(torch.uint8)
