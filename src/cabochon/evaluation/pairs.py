"""How often a judge prefers the answer that people preferred."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from cabochon.core.errors import DataError, NonFinite
from cabochon.evaluation.intervals import Interval, mean_interval

__all__ = ["PairAccuracy", "pair_accuracy"]


@dataclass(frozen=True, kw_only=True)
class PairAccuracy:
    """A judge on held-out pairs."""

    accuracy: float
    """Share of pairs whose preferred answer scores higher; equal scores count one half."""
    interval: Interval | None
    """Of `accuracy`, 95%, over pairs; None with a single one."""
    pairs: int
    margin: float
    """Mean of the preferred answer's score less the other's."""
    loss: float
    """Mean of -log sigmoid(margin), in nats; log 2 is that of even odds."""

    @property
    def decided(self) -> bool:
        """True if the interval leaves out one half."""
        return self.interval is not None and not self.interval[0] <= 0.5 <= self.interval[1]


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> PairAccuracy:
    """Of the scores of n pairs.

    Args:
        chosen: n, of the answers that people preferred.
        rejected: n, of the others.

    Raises:
        DataError: there is no pair, or the counts differ.
        NonFinite: a score is NaN or infinite; names the pair.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 1 or len(chosen) == 0:
        raise DataError(
            f"{tuple(chosen.shape)} preferred answers and {tuple(rejected.shape)} others; give one "
            "score for each answer of at least one pair"
        )
    margin = chosen.double() - rejected.double()
    broken = (~margin.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise NonFinite(f"the scores of pair {broken[0]} are no finite numbers")
    won = ((margin > 0.0).double() + 0.5 * (margin == 0.0)).tolist()
    return PairAccuracy(
        accuracy=sum(won) / len(won),
        interval=mean_interval(won),
        pairs=len(won),
        margin=margin.mean().item(),
        loss=softplus(-margin).mean().item(),
    )
