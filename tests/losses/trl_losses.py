"""TRL's losses, by its trainers' own code, on tensors that we give: the oracle."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )


def _metrics() -> dict[str, Any]:
    return {"train": defaultdict(list), "eval": defaultdict(list)}


def trl_dpo(logps: dict[str, Tensor], *, beta: float, divergence: str, alpha: float) -> float:
    """The mean loss of DPOTrainer where each completion is one token of these log-probabilities.

    Args:
        logps: n each: policy's chosen "c" and rejected "r", the reference's "rc" and "rr".
        beta: its strength.
        divergence: its `f_divergence_type`.
        alpha: its `f_alpha_divergence_coef`.
    """
    from trl import DPOTrainer  # type: ignore[import-not-found]

    both = torch.cat([logps["c"], logps["r"]])
    reference = torch.cat([logps["rc"], logps["rr"]])
    rows = len(both)
    mask = torch.tensor([[0, 1]]).repeat(rows, 1)

    def model(**_: Any) -> SimpleNamespace:
        column = both[:, None]
        return SimpleNamespace(
            log_probs=column,
            entropy=torch.zeros_like(column),
            mean_logits=torch.zeros_like(column),
            is_top1=torch.zeros_like(column, dtype=torch.bool),
        )

    trainer: Any = SimpleNamespace(
        model=torch.nn.Module(),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics=_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros(rows, 2, dtype=torch.int64),
        "attention_mask": torch.ones(rows, 2, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return float(DPOTrainer._compute_loss(trainer, model, inputs, False))


def trl_bradley_terry(chosen: Tensor, rejected: Tensor, *, centre: float) -> float:
    """The mean loss of RewardTrainer on these scores."""
    from trl import RewardTrainer

    logits = torch.cat([chosen, rejected])[:, None]
    trainer: Any = SimpleNamespace(
        model=torch.nn.Module(),
        accelerator=_accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=centre),
        aux_loss_enabled=False,
        _metrics=_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(logits), 1, dtype=torch.int64)}
    return float(
        RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    )
