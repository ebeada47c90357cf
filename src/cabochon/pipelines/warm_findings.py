"""What WARM's report says: the average beside its members and beside their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.data.preferences import PairTokens
from cabochon.evaluation.intervals import mean_interval
from cabochon.evaluation.pairs import pair_accuracy
from cabochon.evaluation.warm_page import SETS
from cabochon.models.reward_head import RewardModel
from cabochon.rewards.preference_model import score_sequences

__all__ = ["Judged", "findings", "judge", "table"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model's scores of the answers of every set of pairs."""

    chosen: Mapping[str, Tensor]
    """Set -> n float32."""
    rejected: Mapping[str, Tensor]

    def accuracy(self, name: str) -> float:
        """On one of the sets."""
        return pair_accuracy(self.chosen[name], self.rejected[name]).accuracy

    def right(self, name: str) -> Tensor:
        """n float64: 1 where the preferred answer scores higher, 0.5 where both are equal."""
        return _right(self.chosen[name] - self.rejected[name])


def judge(model: RewardModel, sets: Mapping[str, Sequence[PairTokens]], *, rows: int) -> Judged:
    """The model's scores; answers that several sets share are read once."""
    texts = [
        (*pair.prompt, *said)
        for pairs in sets.values()
        for pair in pairs
        for said in (pair.chosen, pair.rejected)
    ]
    distinct = list(dict.fromkeys(texts))
    values = score_sequences(model, distinct, rows=rows).tolist()
    known = dict(zip(distinct, values, strict=True))

    def scores(pairs: Sequence[PairTokens], side: str) -> Tensor:
        return torch.tensor([known[(*pair.prompt, *getattr(pair, side))] for pair in pairs])

    return Judged(
        chosen={name: scores(pairs, "chosen") for name, pairs in sets.items()},
        rejected={name: scores(pairs, "rejected") for name, pairs in sets.items()},
    )


def findings(
    sets: Mapping[str, Sequence[PairTokens]],
    *,
    probe: Judged,
    members: Sequence[Judged],
    recipes: Sequence[Mapping[str, Any]],
    order: Sequence[int],
    best: Sequence[int],
    ranks_by: str,
    warm: Judged,
) -> dict[str, object]:
    """The contents of results.json, plain JSON.

    Args:
        sets: the pairs, by name.
        probe: the start with its head, before any member was trained.
        members: M.
        recipes: M, what tells them apart.
        order: the members from best to worst.
        best: those that were averaged.
        ranks_by: the set that ranked them.
        warm: the average.

    Raises:
        DataError: no member was averaged.
    """
    if not best:
        raise DataError("no member was averaged")
    chosen = [members[number] for number in best]
    return {
        "pipeline": "warm",
        "title": "Reward models, averaged",
        "repeat": "",
        "ranked_by": ranks_by,
        "order": list(order),
        "averaged": list(best),
        "members": [
            {"member": number, **recipe, **{name: each.accuracy(name) for name in sets}}
            for number, (recipe, each) in enumerate(zip(recipes, members, strict=True))
        ],
        "sets": {name: _robustness(name, probe, chosen, warm) for name in sets},
    }


def table(results: Mapping[str, Any]) -> str:
    """The same for people, as Markdown."""
    lines = ["# WARM", "", "Accuracy on pairs; in brackets 95% intervals over pairs.", ""]
    lines += ["| pairs | n | probe | mean member | ensemble | average | average - ensemble |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name, each in results["sets"].items():
        gap = each["average_minus_ensemble"]
        interval = gap["interval"]
        sure = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
        lines.append(
            f"| {SETS[name]} | {each['pairs']} | {each['probe']:.3f} | {each['mean_member']:.3f} "
            f"| {each['ensemble']['accuracy']:.3f} | {each['average']['accuracy']:.3f} "
            f"| {gap['mean']:+.3f}{sure} |"
        )
    lines += ["", f"Members, ranked on {SETS[results['ranked_by']]}:", ""]
    names = list(results["sets"])
    lines += ["| member | start | learning rate | dropout | " + " | ".join(names) + " |"]
    lines += ["| --- " * (4 + len(names)) + "|"]
    for number in results["order"]:
        member = results["members"][number]
        mark = "" if number in results["averaged"] else " (left out)"
        scores = " | ".join(f"{member[name]:.3f}" for name in names)
        lines.append(
            f"| {number}{mark} | {member['start']} | {member['learning_rate']:g} "
            f"| {member['dropout']:g} | {scores} |"
        )
    return "\n".join(lines) + "\n"


def _robustness(
    name: str, probe: Judged, members: Sequence[Judged], warm: Judged
) -> dict[str, object]:
    """The average against the ensemble (the mean of the members' scores) and the mean member."""
    chosen = torch.stack([each.chosen[name].double() for each in members]).mean(0)
    rejected = torch.stack([each.rejected[name].double() for each in members]).mean(0)
    ensemble = _right(chosen - rejected)
    mean_member = torch.stack([each.right(name) for each in members]).mean(0)
    average = warm.right(name)
    return {
        "pairs": len(chosen),
        "probe": probe.accuracy(name),
        "mean_member": mean_member.mean().item(),
        "ensemble": asdict(pair_accuracy(chosen, rejected)),
        "average": asdict(pair_accuracy(warm.chosen[name], warm.rejected[name])),
        "average_minus_ensemble": _difference(average - ensemble),
        "average_minus_mean_member": _difference(average - mean_member),
    }


def _right(margin: Tensor) -> Tensor:
    return (margin > 0.0).double() + 0.5 * (margin == 0.0)


def _difference(values: Tensor) -> dict[str, object]:
    return {"mean": values.mean().item(), "interval": mean_interval(values.tolist())}
