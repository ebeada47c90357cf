"""A scalar head on a language model: one number for each document, read at its last token.

The last token is where the document ends, by position. No token is searched for: padding on either
side, its id, EOS standing for padding, neighbours in the batch or in the row change nothing. On
the disk it is what transformers calls a ...ForSequenceClassification with one label, whose head is
`score.weight`.

Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.4 (the unembedding replaced by a projection
to a scalar).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cabochon.core.errors import ConfigError, FolderError, WeightsMismatch
from cabochon.core.types import LinearPrediction, TokenBatch
from cabochon.models.foreign import (
    ForeignModel,
    check_told,
    quiet,
    refuse_integer_weights,
    transformers_library,
)
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.shards import Shards, staged
from cabochon.weight_files import read_json, weight_files, write_json

__all__ = [
    "RewardModel",
    "is_reward_model",
    "last_tokens",
    "read_reward_model",
    "write_reward_model",
]

_SCORE = "score.weight"
_KIND = "ForSequenceClassification"


class RewardModel(nn.Module):
    """A backbone and a scalar head.

    Attributes:
        backbone: a Gemma, or any causal model of transformers without its unembedding.
        score: 1 D, the head; there is no bias, which no preference could tell.
    """

    def __init__(self, backbone: Gemma | ForeignModel, score: Tensor | None = None) -> None:
        """A head on a language model, which it shares.

        Args:
            backbone: a language model, whose own head, if it is untied, is left behind.
            score: 1 D; zeros when absent, so that a preference begins at even odds.

        Raises:
            ConfigError: the head is of another width.
        """
        super().__init__()
        if isinstance(backbone, ForeignModel) and not isinstance(backbone.inner, _Headless):
            backbone = ForeignModel(_Headless(backbone.inner.base_model))
        self.backbone: Gemma | ForeignModel = backbone
        like = next(backbone.parameters())
        width = _width(backbone)
        if score is None:
            score = torch.zeros(1, width, dtype=like.dtype, device=like.device)
        if tuple(score.shape) != (1, width):
            raise ConfigError(
                f"the head has shape {tuple(score.shape)}, the model's width makes it (1, {width})"
            )
        self.score = nn.Parameter(score.detach().to(like))
        self.training = backbone.training

    def forward(self, batch: TokenBatch) -> Tensor:
        """n float32: how good each document of the batch is, row by row, in order within a row."""
        return self.score_of(self.features(batch))

    def features(self, batch: TokenBatch) -> Tensor:
        """n D: what the head reads of each document, in the type of the weights."""
        prediction = self.backbone(batch)
        if not isinstance(prediction, LinearPrediction):
            raise ConfigError(
                f"{type(prediction).__name__} keeps no hidden states for a scalar head to read"
            )
        return prediction.hidden.flatten(0, 1)[last_tokens(batch)]

    def score_of(self, features: Tensor) -> Tensor:
        """n float32: of what `features` gave, n D."""
        return (features.float() @ self.score.float().T).squeeze(-1)

    @property
    def context(self) -> int:
        """Tokens of the longest document the model is meant for."""
        return self.backbone.context


def last_tokens(batch: TokenBatch) -> Tensor:
    """n int64: where in the flattened (B T) positions each document ends.

    A document is a stretch of equal `documents` of a row, none of them -1.
    """
    inside = batch.documents >= 0
    ends = inside.clone()
    ends[:, :-1] &= batch.documents[:, 1:] != batch.documents[:, :-1]
    return ends.flatten().nonzero().flatten()


def is_reward_model(folder: Path | str) -> bool:
    """Whether config.json of a folder names a ...ForSequenceClassification.

    Raises:
        FolderError: there is no config.json that can be read.
    """
    named = read_json(Path(folder) / "config.json").get("architectures") or []
    return isinstance(named, list) and any(str(each).endswith(_KIND) for each in named)


def read_reward_model(
    folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardModel:
    """The reward model in a Hugging Face folder, ours or of transformers or TRL.

    Args:
        folder: config.json and safetensors of a ...ForSequenceClassification with one label.
        dtype: cast the weights to this type; None keeps the folder's.
        device: where the parameters go.

    Raises:
        FolderError: a file is absent or damaged, or the folder holds another kind of model.
        ConfigError: config.json describes a Gemma that our decoder does not compute.
        WeightsMismatch: a tensor is missing, surplus or misshaped, or the head has several labels.
        MissingExtra: the model is no Gemma, and transformers is not installed.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if not is_reward_model(folder):
        raise FolderError(
            f"{folder} holds {values.get('architectures')}, expected a ...{_KIND} with one label; "
            "train one on preferences: cabochon train reward_model"
        )
    weight_files(folder)
    _check_head(Shards(folder), folder)
    if values.get("model_type") not in ("gemma", "gemma2"):
        return _read_foreign(folder, dtype, device)
    backbone = read_gemma(folder, dtype, device, beside=frozenset({_SCORE}))
    score = Shards(folder).tensor(_SCORE).to(device)
    return RewardModel(backbone, score).eval()


def write_reward_model(
    model: RewardModel, folder: Path | str, *, max_shard_bytes: int = 4 * 1024**3
) -> None:
    """Write config.json and safetensors that transformers reads as ...ForSequenceClassification.

    Raises:
        FolderError: a file could not be written.
    """
    folder = Path(folder)
    backbone = model.backbone
    if isinstance(backbone, ForeignModel):
        _write_foreign(model, backbone, folder, max_shard_bytes)
        return
    write_gemma(
        backbone, folder, max_shard_bytes=max_shard_bytes, beside={_SCORE: model.score.detach()}
    )
    values = read_json(folder / "config.json")
    family = "Gemma2" if backbone.config.post_norms else "Gemma"
    values["architectures"] = [f"{family}{_KIND}"]
    values["id2label"], values["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    write_json(folder / "config.json", values)


class _Headless(nn.Module):
    """The body of a model of transformers, with a small fixed head for the trials of its masks."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body: Any = body
        self.config: Any = body.config
        width = int(body.config.get_text_config().hidden_size)
        trial = nn.Linear(width, 8, bias=False, device=self.device, dtype=self.dtype)
        stream = torch.Generator().manual_seed(0)
        drawn = torch.randn(8, width, generator=stream) / width**0.5
        trial.weight.data.copy_(drawn)
        self._trial = (trial,)  # no child: nothing learns it and nothing saves it
        self.training = body.training

    @property
    def base_model(self) -> nn.Module:
        body: nn.Module = self.body
        return body

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.body.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.body.parameters()).dtype
        return dtype

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.body.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self._trial[0]

    def forward(self, **inputs: Any) -> Any:
        output = self.body(**inputs)
        output.logits = self._trial[0](output.last_hidden_state)
        return output


def _width(backbone: Gemma | ForeignModel) -> int:
    if isinstance(backbone, Gemma):
        return backbone.config.width
    return int(backbone.config.get_text_config().hidden_size)


def _check_head(shards: Shards, folder: Path) -> None:
    if _SCORE not in shards.names:
        raise WeightsMismatch(
            f"{folder} has no {_SCORE}: its head is of another form than a matrix on the last "
            "token's hidden state"
        )
    labels = shards.shape(_SCORE)[0]
    if labels != 1:
        raise WeightsMismatch(f"{folder} classifies into {labels} labels; a reward has one")


def _read_foreign(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str
) -> RewardModel:
    transformers = transformers_library()
    try:
        with quiet(transformers):
            inner, told = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise FolderError(f"transformers cannot read {folder}: {error}") from error
    check_told(told)
    refuse_integer_weights(folder, inner)
    inner = inner.to(device).eval()
    backbone = ForeignModel(_Headless(inner.base_model))
    return RewardModel(backbone, inner.score.weight).eval()


def _write_foreign(
    model: RewardModel, backbone: ForeignModel, folder: Path, max_shard_bytes: int
) -> None:
    transformers = transformers_library()
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    config.num_labels = 1
    with quiet(transformers), staged(folder) as aside:
        whole = transformers.AutoModelForSequenceClassification.from_config(config)
        whole = whole.to(model.score.dtype)
        whole.base_model.load_state_dict(backbone.inner.base_model.state_dict())
        whole.score.weight.data.copy_(model.score.data)
        whole.save_pretrained(aside, max_shard_size=max_shard_bytes)
