"""Any causal language model of transformers, behind the same protocol as our own.

Documents are kept apart, and padding out, by a mask that we build and transformers passes on. Not
every architecture can be masked so (recurrent ones cannot): each model is tried once, on a few
tokens, when it is wrapped; where packing would not be exact it is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cabochon.core.errors import DataError, FolderError, MissingExtra, WeightsMismatch
from cabochon.core.keys import Key
from cabochon.core.types import LinearPrediction, TokenBatch
from cabochon.models.continuation import continued
from cabochon.models.shards import Shards, staged
from cabochon.weight_files import weight_files

__all__ = [
    "DensePrediction",
    "ForeignCache",
    "ForeignModel",
    "check_told",
    "quiet",
    "read_foreign",
    "refuse_integer_weights",
    "transformers_library",
    "write_foreign",
]


@dataclass(frozen=True, kw_only=True)
class DensePrediction:
    """Logits that had to be made whole, since the model's head is more than a matrix."""

    dense: Tensor
    """B T V."""

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        """n V float32: of the chosen rows of the flattened (B T) positions."""
        return self.dense.flatten(0, 1)[rows].float()


class ForeignCache:
    """transformers' growing cache, and which of its slots hold what."""

    def __init__(self, rows: int, capacity: int, *, device: torch.device) -> None:
        self.past = transformers_library().DynamicCache()
        self._capacity = capacity
        self._lengths = [0] * rows
        self.held = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        """B S: the slot holds a token of the row's present document."""
        self.positions = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        """B S."""

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self._capacity

    def select(self, rows: Tensor) -> ForeignCache:
        """This cache, with the past of the chosen rows, in that order; one may be chosen twice."""
        rows = rows.to(self.held.device)
        if len(rows) == 0:
            self.past = transformers_library().DynamicCache()
            self.held, self.positions = self.held[:0, :0], self.positions[:0, :0]
        else:
            self.past.batch_select_indices(rows)
            self.held, self.positions = self.held[rows], self.positions[rows]
        self._lengths = [self._lengths[row] for row in rows.tolist()]
        return self

    def put(self, rows: Tensor, other: ForeignCache, sources: Tensor) -> None:
        """Let `rows` hold what `sources` of another cache hold; rows after the last are new."""
        rows, sources = rows.to(self.held.device), sources.to(self.held.device)
        places = rows.tolist()
        count = max(len(self._lengths), max(places) + 1)
        kept = torch.ones(len(self._lengths), dtype=torch.bool)
        kept[[place for place in places if place < len(kept)]] = False
        self._close_up(max([n for n, keep in zip(self._lengths, kept, strict=True) if keep] or [0]))
        slots = max(self.held.shape[1], other.held.shape[1])
        self.held = _room(self.held, count, slots)
        self.positions = _room(self.positions, count, slots)
        self.held[rows], self.positions[rows] = False, 0
        self.held[rows, : other.held.shape[1]] = other.held[sources]
        self.positions[rows, : other.held.shape[1]] = other.positions[sources]
        past, mine = transformers_library().DynamicCache(), self.past.layers
        for number, theirs in enumerate(other.past.layers):
            both = []
            for name in ("keys", "values"):
                brought = getattr(theirs, name)[sources]
                filled = brought.new_zeros(count, brought.shape[1], slots, brought.shape[3])
                if number < len(mine):
                    old = getattr(mine[number], name)
                    filled[: len(old), :, : old.shape[2]] = old
                filled[rows, :, : brought.shape[2]] = brought
                both.append(filled)
            past.update(*both, number)
        self.past = past
        self._lengths += [0] * (count - len(self._lengths))
        for place, source in zip(places, sources.tolist(), strict=True):
            self._lengths[place] = other._lengths[source]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Take the newest tokens of each row back, so that so many are left of it."""
        self._lengths = list(lengths)
        left = torch.tensor(self._lengths, device=self.held.device)
        self.held &= self.positions < left.unsqueeze(1)
        if self.held.shape[1] > 2 * max(self._lengths):
            self._close_up(max(self._lengths))

    def _close_up(self, longest: int) -> None:
        """Move what is held to the front and keep `longest` slots: else a cache only grows."""
        order = (~self.held).long().argsort(dim=1, stable=True)[:, :longest]
        self.held, self.positions = self.held.gather(1, order), self.positions.gather(1, order)
        for layer in self.past.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                places = order[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
                setattr(layer, name, old.gather(2, places))

    def remember(self, batch: TokenBatch) -> None:
        """Make the slots for the new tokens known.

        Raises:
            DataError: a row does not go on from what the cache holds of it.
        """
        for row, span in enumerate(continued(self._lengths, batch, self._capacity)):
            if span:
                self._lengths[row] = span.stop
                if span.start == 0:
                    self.held[row] = False
        self.held = torch.cat([self.held, batch.documents >= 0], dim=1)
        self.positions = torch.cat([self.positions, batch.positions], dim=1)


class ForeignModel(nn.Module):
    """A causal language model of transformers.

    Attributes:
        inner: the model itself.
        config: its configuration, transformers' own.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Wrap a model, and try on a few tokens how its head and its masks can be used."""
        super().__init__()
        training = inner.training
        self.inner: Any = inner.eval()
        self.config: Any = inner.config
        self._head_is_linear = self._masks_hold = True  # what the trials go by
        with torch.no_grad():
            self._head_is_linear = _head_is_linear(self)
            self._masks_hold = _masks_hold(self)
        self.inner = inner.train(training)

    def forward(
        self, batch: TokenBatch, cache: ForeignCache | None = None
    ) -> LinearPrediction | DensePrediction:
        """Predictions for every token of `batch`.

        With a cache the past comes from it, the new tokens go into it, and no gradient is made.

        Raises:
            DataError: packed or left-padded rows, or a cache, for an architecture in which they
                would not be exact.
        """
        if cache is not None:
            self._need_masks("a cache of rows with their own lengths")
            cache.remember(batch)
            distance = batch.positions[:, :, None] - cache.positions[:, None, :]
            visible = cache.held[:, None, :] & (distance >= 0)
            with torch.no_grad():
                return self._predict(batch, self._mask(visible, distance), cache.past)
        if _is_plain(batch) and (not self._masks_hold or bool((batch.documents >= 0).all())):
            return self._predict(batch, None, None)
        self._need_masks("a batch with packed documents or padding on the left")
        distance = batch.positions[:, :, None] - batch.positions[:, None, :]
        visible = (batch.documents[:, :, None] == batch.documents[:, None, :]) & (distance >= 0)
        return self._predict(batch, self._mask(visible, distance), None)

    @property
    def context(self) -> int:
        """Tokens of the longest document the model is meant for; recurrent ones know no limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return sys.maxsize if limit is None else int(limit)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> ForeignCache:  # noqa: ARG002
        """An empty cache for `rows` sequences of at most `capacity` tokens.

        Its `rewind` can take back any number of tokens, whatever `ahead`.
        """
        return ForeignCache(rows, capacity, device=self.inner.device)

    def _need_masks(self, purpose: str) -> None:
        if not self._masks_hold:
            raise DataError(
                f"{type(self.inner).__name__} cannot be masked exactly, which {purpose} needs; "
                "give one document a row, padded on the right, without a cache"
            )

    def _mask(self, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """What transformers adds to the scores, B 1 T S: one for all layers, or one a kind."""
        lowest = torch.finfo(self.inner.dtype).min
        masks = {}
        for kind, window in (_windows(self.config) or {}).items():
            seen = visible if window is None else visible & (distance < window)
            closed = torch.zeros(seen.shape, dtype=self.inner.dtype, device=seen.device)
            masks[kind] = closed.masked_fill_(~seen, lowest).unsqueeze(1)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _predict(
        self, batch: TokenBatch, mask: Tensor | dict[str, Tensor] | None, past: Any
    ) -> LinearPrediction | DensePrediction:
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": past is not None}
        if mask is not None:
            inputs |= {"position_ids": batch.positions, "attention_mask": mask}
        if past is not None:
            inputs["past_key_values"] = past
        if not self._head_is_linear:
            return DensePrediction(dense=self.inner(**inputs).logits)
        return LinearPrediction(
            hidden=self.inner.base_model(**inputs).last_hidden_state,
            head=self.inner.get_output_embeddings().weight,
            cap=getattr(self.config.get_text_config(), "final_logit_softcapping", None),
        )


def _room(values: Tensor, rows: int, slots: int) -> Tensor:
    """`values` (B S) with zeros for further rows and slots."""
    wider = values.new_zeros(rows, slots)
    wider[: values.shape[0], : values.shape[1]] = values
    return wider


def read_foreign(
    folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ForeignModel:
    """The causal language model in a Hugging Face folder, read by transformers but strictly.

    Args:
        folder: config.json and safetensors of any architecture that transformers has built in;
            code in the folder is never run.
        dtype: cast to this type; None takes what config.json says.
        device: where the parameters go.

    Raises:
        MissingExtra: transformers is not installed.
        FolderError: a file is absent, damaged, or of an architecture that transformers lacks.
        WeightsMismatch: a tensor is missing, surplus, misshaped or of an integer type.
    """
    transformers = transformers_library()
    folder = Path(folder)
    weight_files(folder)
    Shards(folder)
    try:
        with quiet(transformers):
            inner, told = transformers.AutoModelForCausalLM.from_pretrained(
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
    return ForeignModel(inner.to(device).eval())


def write_foreign(
    model: ForeignModel, folder: Path | str, *, max_shard_bytes: int = 4 * 1024**3
) -> None:
    """Write config.json and safetensors through transformers, in the type of the parameters.

    Args:
        model: as read, or trained since.
        folder: made if absent; weights of an earlier save in it are replaced.
        max_shard_bytes: of one safetensors file.

    Raises:
        FolderError: a file could not be written.
    """
    with quiet(transformers_library()), staged(Path(folder)) as aside:
        model.inner.save_pretrained(aside, max_shard_size=max_shard_bytes)


def refuse_integer_weights(folder: Path, inner: nn.Module) -> None:
    """A parameter must be stored as a floating-point tensor.

    Raises:
        WeightsMismatch: one is not; it is named.
    """
    shards = Shards(folder)
    for name in shards.names & dict(inner.named_parameters()).keys():
        shards.dtype(name)


def transformers_library() -> Any:
    """transformers, imported now.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "a model that is no Gemma") from error
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without a progress bar in a caller's output, nor warnings of what we make errors."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def check_told(told: dict[str, Any]) -> None:
    """Turn what transformers only warns of into errors.

    Raises:
        WeightsMismatch: a tensor is missing, surplus or misshaped.
    """
    for key, problem in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold, without a place for it,"),
        ("mismatched_keys", "hold in another shape"),
    ):
        found = sorted(str(each) for each in told.get(key) or ())
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise WeightsMismatch(f"the files {problem} {found[0]}{more}")
    if told.get("error_msgs"):
        raise WeightsMismatch(f"transformers could not load the weights: {told['error_msgs']}")


def _is_plain(batch: TokenBatch) -> bool:
    """One document a row from its first column on, with padding, if any, on the right."""
    held = batch.documents >= 0
    columns = torch.arange(batch.shape[1], device=held.device)
    alone = (batch.documents == batch.documents[:, :1]) & (batch.positions == columns)
    right = held[:, :-1] >= held[:, 1:]
    return bool((alone | ~held).all() and right.all() and held[:, 0].all())


def _windows(config: Any) -> dict[str, int | None] | None:
    """The window of each kind of layer; None where there are kinds that no mask describes."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if not kinds:
        return {"all": window}
    known = {"full_attention": None, "sliding_attention": window}
    return {kind: known[kind] for kind in kinds} if known.keys() >= set(kinds) else None


def _probe(model: ForeignModel, *lengths: int) -> list[Tensor]:
    vocabulary = model.inner.get_input_embeddings().weight.shape[0]
    device = model.inner.device
    return [
        torch.randint(vocabulary, (length,), generator=Key(0).fold("probe", number).generator()).to(
            device
        )
        for number, length in enumerate(lengths)
    ]


def _same(model: ForeignModel, first: Tensor, second: Tensor, *, roundings: int) -> bool:
    """Equal up to so many roundings in the model's type."""
    slack = roundings * torch.finfo(model.inner.dtype).eps * first.abs().max().clamp(min=1e-6)
    return bool((first - second).abs().max() <= slack)


def _head_is_linear(model: ForeignModel) -> bool:
    """Whether hidden states times a matrix, capped, are the logits that transformers gives."""
    head = model.inner.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return False
    (tokens,) = _probe(model, 4)
    whole = model.inner(input_ids=tokens[None], use_cache=False).logits.float()
    made = model(TokenBatch.of([tokens.cpu()]).to(tokens.device)).logits(slice(None))
    return _same(model, whole[0], made, roundings=4)


def _masks_hold(model: ForeignModel) -> bool:
    """Whether our masks give what transformers gives for documents alone, windows included."""
    text = model.config.get_text_config()
    windows = _windows(model.config)
    if windows is None:
        return False
    first, second, another = _probe(model, 3, 6, 3)
    shortened = 2 if any(windows.values()) else None
    before = getattr(text, "sliding_window", None)
    if shortened:
        text.sliding_window = shortened
    try:
        alone = [model.inner(input_ids=t[None], use_cache=False).logits[0] for t in (first, second)]
        together = _packed_logits(model, first, second)
        beside_another = _packed_logits(model, another, second)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        if shortened:
            text.sliding_window = before
    apart = torch.equal(together[len(first) :], beside_another[len(first) :])
    return apart and _same(model, torch.cat(alone).float(), together, roundings=32)


def _packed_logits(model: ForeignModel, *documents: Tensor) -> Tensor:
    """Logits of documents that share a row, behind one token of padding."""
    padding = documents[0][:1]
    tokens = torch.cat([padding, *documents])[None]
    sizes = torch.tensor([1, *map(len, documents)])
    ids = torch.arange(-1, len(documents)).repeat_interleave(sizes)[None]
    positions = torch.cat([torch.arange(int(size)) for size in sizes])[None]
    batch = TokenBatch(
        tokens=tokens, positions=positions, documents=ids, targets=tokens, mask=ids >= 0
    )
    logits: Tensor = model(batch.to(tokens.device)).logits(slice(1, None))
    return logits
