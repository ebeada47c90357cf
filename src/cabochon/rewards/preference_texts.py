"""A model of preferences that has a tokenizer of its own, as a judge of texts.

    judge = preferred_texts(model, own)
    reward = judged_together(judge, tokenizer.decode, partial(decode_prompt, tokenizer))

Prompt and completion are written as the model learned to read them, and its score is the head's at
the last token. A model from elsewhere learned on what transformers makes of a text: all that its
chat template writes, or a plain text with what its tokenizer.json puts around any. One that was
trained here learned on pairs (`data.preferences`), which end with the token that ends the answer.
A completion is written as finished, though the length limit may have cut it: of other places than
the end of an answer neither kind has learned anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.chat import Message, encode_published
from cabochon.data.preferences import encode_answer
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.reward_head import RewardModel
from cabochon.rewards.preference_model import score_sequences
from cabochon.rewards.texts import Exchange, TextsJudge

__all__ = ["encode_exchange", "preferred_texts"]


def preferred_texts(
    model: RewardModel, tokenizer: Tokenizer, *, trained_here: bool = False, rows: int = 16
) -> TextsJudge:
    """The judge that a model of preferences is of texts.

    Args:
        model: used in evaluation mode, without gradients, where it is.
        tokenizer: its own.
        trained_here: on pairs as `train reward_model` writes them.
        rows: texts that are read at a time; it changes no score beyond rounding.

    Returns:
        A judge that raises DataError for a text that the model has no room for, or that its chat
        template refuses; nothing is cut off. The sample is named.

    Raises:
        ConfigError: `rows` is below 1.
    """
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, got {rows}")

    def judge(exchanges: Sequence[Exchange]) -> Tensor:
        sequences = []
        for each in exchanges:
            try:
                ids = encode_exchange(tokenizer, each, trained_here=trained_here)
            except DataError as error:
                raise DataError(f"{each.name}: the reward model's tokenizer: {error}") from error
            if not 0 < len(ids) <= model.context:
                raise DataError(
                    f"{each.name}: {len(ids)} tokens of the reward model's tokenizer with the "
                    f"prompt, and it reads 1 to {model.context}; lower --max-new-tokens, or leave "
                    "out long prompts"
                )
            sequences.append(ids)
        return score_sequences(model, sequences, rows=rows)

    return judge


def encode_exchange(
    tokenizer: Tokenizer, exchange: Exchange, *, trained_here: bool = False
) -> list[int]:
    """The token ids that a model of preferences reads.

    Args:
        tokenizer: the model's own.
        exchange: prompt and completion.
        trained_here: see `preferred_texts`.

    Raises:
        DataError: the tokenizer has no chat format for the turns, or it refuses them.
    """
    prompt, completion = exchange.prompt, exchange.completion
    if trained_here:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return encode_answer(tokenizer, turns, completion, plain=isinstance(prompt, str))
    if isinstance(prompt, str):
        return tokenizer.encode_framed(prompt + completion)
    return encode_published(tokenizer, [*prompt, Message("model", completion)])
