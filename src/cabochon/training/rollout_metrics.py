"""What sequences were like that a model wrote and learns from: sums in a report, then metrics.

`fit` divides every sum of a report by the loss's weight, whatever that counts. Ratios of two such
sums do not depend on it, nor on how a batch was split over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cabochon.core import Prediction, Step
from cabochon.data.continuations import Sequences

__all__ = ["metrics", "sums", "together"]

RATIOS = {
    "completion_tokens": ("sum_tokens", "sum_rows"),
    "on_policy": ("sum_own", "sum_rows"),
    "stopped": ("sum_stopped", "sum_own"),
    "reward": ("sum_reward", "sum_own"),
    "logprob_gap": ("sum_gap", "sum_compared"),
    "entropy": ("sum_surprisal", "sum_tokens"),
    "lag": ("sum_lag", "sum_tokens"),
    "clipped": ("sum_clipped", "sum_units"),
    "no_signal": ("sum_silent", "sum_groups"),
    "value_error": ("sum_value_error", "sum_tokens"),
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
    entropy            nats: mean surprisal of a token to who drew it
    lag                updates between the weights that drew a token and those that learn from it
    clipped            share of the importance ratios that were cut
    effective          effective sample size by those ratios, (sum)^2 / (n sum of squares)
    no_signal          share of the groups whose rewards are all equal
    value_error        mean squared error of the values of a learned baseline
    """
    found = {name: value for name, value in report.items() if not name.startswith("sum_")}
    for name, (numerator, denominator) in RATIOS.items():
        if numerator in report and report[denominator] > 0.0:
            found[name] = report[numerator] / report[denominator]
    if report.get("sum_ratio_squared", 0.0) > 0.0:
        squares = report["sum_units"] * report["sum_ratio_squared"]
        found["effective"] = report["sum_ratio"] ** 2 / squares
    return found


def together(index: int, made: Sequence[Step]) -> Step:
    """Several updates, of which the reports hold sums, as the one step `index`.

    Losses and metrics are their means, the gradient norm is the largest, the rate the last.
    """
    reports = [metrics(each.report) for each in made]
    return Step(
        index=index,
        loss=sum(each.loss for each in made) / len(made),
        grad_norm=max(each.grad_norm for each in made),
        weight=made[0].weight,
        learning_rate=made[-1].learning_rate,
        report={name: sum(each[name] for each in reports) / len(made) for name in reports[0]},
    )
