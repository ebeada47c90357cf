"""What sequences were like that a model wrote and learns from: sums in a report, then metrics.

`fit` divides every sum of a report by the loss's weight, whatever that counts. Ratios of two such
sums do not depend on it, nor on how a batch was split over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cabochon.core import Prediction
from cabochon.data.continuations import Sequences

__all__ = ["metrics", "sums"]

RATIOS = {
    "completion_tokens": ("sum_tokens", "sum_rows"),
    "on_policy": ("sum_own", "sum_rows"),
    "stopped": ("sum_stopped", "sum_own"),
    "reward": ("sum_reward", "sum_own"),
    "logprob_gap": ("sum_gap", "sum_compared"),
}
"""Metric -> the two sums whose ratio it is."""

COMPARED = 32
"""Tokens whose log-probabilities are computed again."""


@torch.no_grad()
def sums(drawn: Sequences, prediction: Prediction, *, rewarded: bool = False) -> dict[str, Tensor]:
    """Sums over one micro-batch, for `Loss.report`.

    The recorded log-probabilities are compared with the training forward's at a few tokens of the
    first sequence that the model wrote itself: enough to see a sampler that computes otherwise.

    Args:
        drawn: B rows.
        prediction: of the rows as they are now, at temperature 1.
        rewarded: there are rewards to report.
    """
    batch, own = drawn.batch, drawn.own.float()
    row = int(drawn.own.int().argmax())  # the first of its own, if there is one
    places = (batch.mask[row] & drawn.own[row]).nonzero().flatten()[:COMPARED]
    targets = batch.targets[row, places].unsqueeze(-1)
    logprob = prediction.logits(places + row * batch.shape[1]).log_softmax(-1)
    gap = (logprob.gather(-1, targets).squeeze(-1) - drawn.recorded[row, places]).abs().sum()
    found = {
        "sum_rows": torch.tensor(float(len(own)), device=own.device),
        "sum_tokens": batch.mask.sum().float(),
        "sum_own": own.sum(),
        "sum_stopped": (drawn.stopped * own).sum(),
        "sum_gap": gap.float(),
        "sum_compared": torch.tensor(float(len(places)), device=own.device),
    }
    return found | ({"sum_reward": (drawn.reward * own).sum()} if rewarded else {})


def metrics(report: Mapping[str, float]) -> dict[str, float]:
    """The report with metrics in place of the sums; those of no sequence at all are left out.

    completion_tokens  mean length of what was written, by the model or by another
    on_policy          share of the sequences that the model wrote itself; of these,
    stopped            the share that a stop token ended,
    reward             their mean reward (where there is one),
    logprob_gap        nats: mean |recorded - recomputed log-probability| of a token
    """
    found = {name: value for name, value in report.items() if not name.startswith("sum_")}
    for name, (numerator, denominator) in RATIOS.items():
        if numerator in report and report[denominator] > 0.0:
            found[name] = report[numerator] / report[denominator]
    return found
