"""A scalar head read where the document ends: whatever stands beside it, and as transformers does.

Oracle: transformers' own ...ForSequenceClassification, asked for one text at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, FolderError, WeightsMismatch
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import (
    RewardModel,
    is_reward_model,
    last_tokens,
    read_reward_model,
    write_reward_model,
)

TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [1, 1, 1], [9, 3, 1, 1, 2, 2]]
"""Some end in ids that elsewhere mean an end or padding."""

CONFIG = GemmaConfig(
    vocab_size=61,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=12,
    ffn_width=40,
    query_scalar=9,
    window=4,
    attention_cap=4.0,
    final_cap=5.0,
    post_norms=True,
    context=64,
)


def drawn(shape: torch.Size | tuple[int, ...], name: str) -> Tensor:
    return torch.randn(shape, generator=Key(11).fold(name).generator())


def gemma_reward() -> RewardModel:
    model = Gemma(CONFIG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(drawn(weight.shape, name) * spread)
    return RewardModel(model, drawn((1, CONFIG.width), "score")).eval()


def hf_classifier(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 1,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    shapes = {"intermediate_size": 40, "num_key_value_heads": 2}
    configs: dict[str, Any] = {
        "Llama": lambda: transformers.LlamaConfig(**settings | shapes | changes),
        "Qwen2": lambda: transformers.Qwen2Config(**settings | shapes | changes),
        "GPT2": lambda: transformers.GPT2Config(**settings | changes),
        "Gemma2": lambda: transformers.Gemma2Config(
            **settings
            | shapes
            | {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 9}
            | changes
        ),
    }
    made = getattr(transformers, f"{kind}ForSequenceClassification")(configs[kind]())
    return made.eval()


@torch.no_grad()
def alone(classifier: Any) -> list[float]:
    return [classifier(torch.tensor([text])).logits[0, 0].item() for text in TEXTS]


@torch.no_grad()
def ours(model: RewardModel, *, left: bool = False, pad: int = 0) -> list[float]:
    return list(model(TokenBatch.of(TEXTS, left=left, pad=pad)).tolist())


def packed(*texts: list[int]) -> TokenBatch:
    """All in one row, with padding between and behind them."""
    tokens, documents, positions = [0], [-1], [0]
    for number, text in enumerate(texts):
        tokens += [*text, 0]
        documents += [number] * len(text) + [-1]
        positions += [*range(len(text)), 0]
    row = torch.tensor([tokens])
    held = torch.tensor([documents])
    return TokenBatch(
        tokens=row, positions=torch.tensor([positions]), documents=held, targets=row, mask=held >= 0
    )


def test_the_last_token_of_each_document_is_found_by_position() -> None:
    batch = TokenBatch(
        tokens=torch.zeros(2, 6, dtype=torch.int64),
        positions=torch.zeros(2, 6, dtype=torch.int64),
        documents=torch.tensor([[-1, 0, 0, 1, -1, -1], [0, 0, 1, 1, 1, 1]]),
        targets=torch.zeros(2, 6, dtype=torch.int64),
        mask=torch.zeros(2, 6, dtype=torch.bool),
    )
    assert last_tokens(batch).tolist() == [2, 3, 7, 11]


@pytest.mark.parametrize("kind", ["gemma", "Llama", "GPT2"])
def test_padding_its_side_and_id_batch_and_packing_change_no_score(kind: str) -> None:
    if kind == "gemma":
        model = gemma_reward()
    else:
        found = hf_classifier(kind)
        model = RewardModel(_backbone(found), found.score.weight)
    with torch.no_grad():
        single = [model(TokenBatch.of([text])).item() for text in TEXTS]
        beside = model(packed(*TEXTS)).tolist()
    for other in (ours(model), ours(model, left=True), ours(model, pad=1), beside):
        assert other == pytest.approx(single, abs=2e-5)
    assert len({round(value, 4) for value in single}) == len(TEXTS)


def _backbone(classifier: Any) -> ForeignModel:
    """The language model of the same body."""
    transformers = pytest.importorskip("transformers")
    config = classifier.config
    whole = transformers.AutoModelForCausalLM.from_config(config)
    whole.base_model.load_state_dict(classifier.base_model.state_dict())
    return ForeignModel(whole.eval())


@pytest.mark.parametrize("kind", ["Gemma2", "Llama", "Qwen2", "GPT2"])
def test_a_reward_model_of_transformers_is_read_with_the_same_scores(
    kind: str, tmp_path: Path
) -> None:
    classifier = hf_classifier(kind)
    classifier.save_pretrained(tmp_path)
    assert is_reward_model(tmp_path)
    assert ours(read_reward_model(tmp_path)) == pytest.approx(alone(classifier), abs=2e-5)


@pytest.mark.parametrize("kind", ["gemma", "Llama", "GPT2"])
def test_transformers_reads_ours_with_the_same_scores_and_so_do_we(
    kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "gemma":
        model = gemma_reward()
    else:
        model = RewardModel(_backbone(hf_classifier(kind)), drawn((1, 32), "score"))
    write_reward_model(model, tmp_path)
    theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == 1
    # transformers leaves out what is equal to the padding id, wherever it stands at the end.
    assert alone(theirs.eval()) == pytest.approx(ours(model), abs=2e-5)
    again = read_reward_model(tmp_path)
    assert ours(again) == ours(model)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_new_head_prefers_nothing() -> None:
    assert ours(RewardModel(Gemma.init(CONFIG, Key(0)))) == [0.0] * len(TEXTS)


def test_gradients_reach_head_and_backbone_from_the_last_token_alone() -> None:
    model = gemma_reward()
    model(TokenBatch.of([[5, 6, 7]])).sum().backward()
    assert model.score.grad is not None
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_other_folders_and_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(1, 3\), the model's width makes it \(1, 32\)"):
        RewardModel(Gemma.init(CONFIG, Key(0)), torch.zeros(1, 3))
    several = hf_classifier("Llama", num_labels=3)
    several.save_pretrained(tmp_path / "several")
    with pytest.raises(WeightsMismatch, match="3 labels; a reward has one"):
        read_reward_model(tmp_path / "several")
    _backbone(hf_classifier("Llama")).inner.save_pretrained(tmp_path / "writes")
    with pytest.raises(FolderError, match=r"expected a \.\.\.ForSequenceClassification"):
        read_reward_model(tmp_path / "writes")
