"""Data parallel training: every rank brings its own micro-batches, all make the same update.

Sums cross the ranks, never means, so the ranks may bring different numbers of units. With one
process nothing here communicates. Parameters that FSDP2 has sharded are summed by FSDP2 itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cabochon.core import Loss
from cabochon.core.errors import ConfigError

__all__ = [
    "UpdateLoss",
    "gradient_norm",
    "on_any_rank",
    "rank",
    "ranks",
    "refuse_sharded",
    "refuse_unequal_start",
    "shard",
    "sum_gradients",
    "sum_losses",
    "wait_for_all",
]

_BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class UpdateLoss:
    """The losses of one update, summed over its micro-batches and ranks."""

    total: float
    weight: float
    report: Mapping[str, float]
    batches: int
    """How many micro-batches were summed."""


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def on_any_rank(value: int, device: torch.device) -> int:
    """The greatest value that any rank brings."""
    if ranks() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared.item())


def wait_for_all(device: torch.device) -> None:
    """Returns when every rank has come here."""
    on_any_rank(0, device)


def sum_losses(losses: Sequence[Loss], device: torch.device) -> UpdateLoss:
    """The sums over these losses and those of all other ranks, the same on every rank.

    Raises:
        ConfigError: the ranks' reports have different entries.
    """
    totals, weights, report = [], [], dict[str, float]()
    for loss in losses:
        scalars = [loss.total, loss.weight, *loss.report.values()]
        total, weight, *values = torch.stack([s.detach().double() for s in scalars]).tolist()
        totals.append(total)
        weights.append(weight)
        for name, value in zip(loss.report, values, strict=True):
            report[name] = report.get(name, 0.0) + value
    own = UpdateLoss(total=sum(totals), weight=sum(weights), report=report, batches=len(losses))
    return own if ranks() == 1 else _sum_over_ranks(own, device)


def sum_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one on any rank, summed in place over the ranks."""
    if ranks() > 1:
        plain = _unsharded(parameters)
        if plain:
            _sum_in_buckets(_present_on_any_rank(plain))
    return [p.grad for p in parameters if p.grad is not None]


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients together, shards of other ranks included."""
    norm = get_total_norm(gradients)
    if ranks() > 1:
        from torch.distributed.tensor import DTensor  # half a second that one process need not pay

        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
    return float(norm.item())


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], *, compute: torch.dtype = torch.float32
) -> None:
    """Spreads parameters, gradients and optimizer state over the ranks (FSDP2), in place.

    Call it before the optimizer is made. `fit` then makes the same updates as without; checkpoints
    of sharded models are not written yet, and `supervise` refuses them.

    Args:
        model: in float32, the same on every rank.
        blocks: modules within it that are gathered for use one after another.
        compute: type in which gathered parameters compute; the shards stay in float32, and
            gradients are summed over the ranks in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, model):
        sharded = fully_shard(module, mp_policy=policy)
        # A sum over the ranks, which is what `fit` divides; FSDP2 would take the mean.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def refuse_sharded(parameters: Sequence[Tensor]) -> None:
    """For what needs whole parameters.

    Raises:
        ConfigError: some are shards.
    """
    if ranks() > 1 and len(_unsharded(parameters)) < len(parameters):
        raise ConfigError(
            "checkpoints of sharded (FSDP2) models are not written yet; train with `fit` alone "
            "and save with torch.distributed.checkpoint, or leave the model whole on every rank"
        )


@torch.no_grad()
def refuse_unequal_start(parameters: Sequence[Tensor]) -> None:
    """Compares a sum of every parameter over the ranks.

    Raises:
        ConfigError: they do not start from the same weights.
    """
    plain = _unsharded(parameters) if ranks() > 1 else []
    if not plain:
        return
    sums = torch.stack([p.double().sum() for p in plain])
    for other, theirs in enumerate(_gathered(sums)):
        if not torch.equal(theirs, sums):
            raise ConfigError(
                f"ranks {rank()} and {other} start from different weights; "
                "make the model from the same key or folder on every rank"
            )


def _sum_over_ranks(own: UpdateLoss, device: torch.device) -> UpdateLoss:
    names = "\n".join(sorted(own.report)).encode()
    header = [own.total, own.weight, float(own.batches), float(len(names))]
    gathered = _gathered(torch.tensor(header, device=device, dtype=torch.float64))
    rows = [row.tolist() for row in gathered]
    bringing = [number for number, row in enumerate(rows) if row[2]]
    report = dict[str, float]()
    if any(row[3] for row in rows):
        leader = bringing[0]
        shared = _names_of(leader, names, int(rows[leader][3]), device)
        # Asked of all, so that no rank goes on to wait for one that has stopped here.
        if on_any_rank(int(own.batches > 0 and own.report.keys() != set(shared)), device):
            raise ConfigError(
                f"rank {rank()} reports {sorted(own.report)}, rank {leader} {shared}; "
                "all ranks must report the same"
            )
        values = torch.tensor([own.report.get(name, 0.0) for name in shared], dtype=torch.float64)
        everyone = torch.stack(_gathered(values.to(device))).sum(0)
        report = dict(zip(shared, everyone.tolist(), strict=True))
    return UpdateLoss(
        total=sum(row[0] for row in rows),
        weight=math.fsum(row[1] for row in rows),
        report=report,
        batches=int(sum(row[2] for row in rows)),
    )


def _names_of(leader: int, names: bytes, size: int, device: torch.device) -> list[str]:
    """What rank `leader` calls the entries of its report: a rank without a batch cannot know."""
    content = list(names) if rank() == leader else [0] * size
    letters = torch.tensor(content, dtype=torch.uint8, device=device)
    dist.broadcast(letters, leader)
    return bytes(letters.tolist()).decode().split("\n") if size else []


def _present_on_any_rank(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Their gradients, zeros where another rank alone has one."""
    present = [int(p.grad is not None) for p in parameters]
    shared = torch.tensor(present, device=parameters[0].device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(parameters, shared.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    return gradients


def _sum_in_buckets(tensors: Sequence[Tensor]) -> None:
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, up to some size: few messages, little memory."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size >= _BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _gathered(tensor: Tensor) -> list[Tensor]:
    rows = [torch.empty_like(tensor) for _ in range(ranks())]
    dist.all_gather(rows, tensor)
    return rows


def _unsharded(parameters: Sequence[Tensor]) -> list[Tensor]:
    from torch.distributed.tensor import DTensor

    return [p for p in parameters if not isinstance(p, DTensor)]
