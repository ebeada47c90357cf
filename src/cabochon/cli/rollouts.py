"""RUN/rollouts: what a run's models write is recorded, and learned from again by `--replay`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cabochon.cli.machine import device_of
from cabochon.cli.settings import RunSettings
from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.rlds.layout import read_notes
from cabochon.data.tokenizer import Tokenizer
from cabochon.rewards.experience import Experience, Observe
from cabochon.rewards.records import Recorder, recorded, recorder, replayed
from cabochon.training import parallel

__all__ = ["NoRows", "Records", "check_replay", "records", "records_of"]


@dataclass(frozen=True, kw_only=True)
class Records:
    """What an algorithm is to do with experience; nothing where both are None."""

    observe: Observe | None
    """Records it."""
    source: Iterable[Experience] | None
    """What was recorded, from the first micro-batch that is due on."""
    recalled: Iterable[Experience] = ()
    """What an interrupted run had drawn beyond its checkpoint: the first that are due. Nothing of
    it is read before it is asked for."""


class NoRows:
    """The data of a run that learns from records alone."""

    def batches(
        self, key: Key, batch_size: int, start: int = 0, *, rank: int = 0, ranks: int = 1
    ) -> Iterator[TokenBatch]:
        """None."""
        del key, batch_size, start, rank, ranks
        return iter(())


@contextmanager
def records(
    run: RunSettings,
    tokenizer: Tokenizer,
    *,
    algorithm: str,
    temperature: float,
    first: int,
    replay: str = "",
    wanted: bool = True,
) -> Iterator[Records]:
    """Within the block experience is recorded into the run's directory, or read from `replay`.

    Args:
        run: whose directory it is.
        tokenizer: of the model that writes.
        algorithm: for the notes of the dataset.
        temperature: that the models write at, for the notes too.
        first: the first micro-batch that is due.
        replay: a run, or its rollouts, to learn from.
        wanted: record what is drawn.
    """
    rank, device = parallel.rank(), device_of(run.device)
    if replay:
        found = replayed(records_of(replay), first, rank=rank)
        yield Records(observe=None, source=_placed(found, device))
    elif run.out and wanted:
        folder = Path(run.out) / "rollouts"
        notes = {"algorithm": algorithm, "sampling_temperature": temperature}
        with recorder(folder, tokenizer, notes=notes, rank=rank) as observe:
            yield Records(observe=observe, source=None, recalled=_recalled(observe, first, device))
    else:
        yield Records(observe=None, source=None)


def check_replay(
    replay: str,
    tokenizer: Tokenizer,
    micro_batches: int,
    *,
    algorithm: str,
    temperature: float,
    batch_size: int,
    longest: int,
) -> None:
    """Whether the records of a run are what another one can learn from.

    Raises:
        TokenizerMismatch: they are of another tokenizer.
        ConfigError: there are fewer of them than wanted; or another algorithm, temperature or
            batch size drew them, or completions longer than `longest` tokens.
        FolderError: there are none.
    """
    folder = records_of(replay)
    there, notes = recorded(folder), read_notes(folder)
    if notes.get("tokenizer") != tokenizer.fingerprint():
        raise TokenizerMismatch(
            f"the rollouts in {folder} are of another tokenizer than the model's; replay them with "
            "the model that their run began from"
        )
    for setting, drawn, given in (
        ("algorithm", notes.get("algorithm"), algorithm),
        ("sampling_temperature", notes.get("sampling_temperature"), temperature),
    ):
        if drawn != given:
            raise ConfigError(
                f"the rollouts in {folder} were drawn with {setting} {drawn}, this run has "
                f"{given}; replay them with the settings they were drawn with"
            )
    first = next(replayed(folder, 0), None)
    if first is not None and parallel.ranks() == 1:
        rows = len(first.groups)
        tokens = max(len(each.tokens) for group in first.groups for each in group.completions)
        if rows != batch_size or tokens > longest:
            raise ConfigError(
                f"the first micro-batch in {folder} is of {rows} prompts, with completions of up "
                f"to {tokens} tokens; this run has --batch-size {batch_size} and --max-new-tokens "
                f"{longest}; replay them with the settings they were drawn with"
            )
    if there < micro_batches:
        raise ConfigError(
            f"{folder} holds {there} micro-batches, the run would learn from {micro_batches}; "
            f"lower --steps (or finish that run: cabochon resume {Path(replay)})"
        )


def records_of(run: str) -> Path:
    """The rollouts of a run, or the folder itself where it is named."""
    folder = Path(run) / "rollouts"
    return folder if folder.is_dir() else Path(run)


def _recalled(observe: Recorder, first: int, device: torch.device) -> Iterator[Experience]:
    yield from _placed(observe.recalled(first), device)


def _placed(found: Iterable[Experience], device: torch.device) -> Iterator[Experience]:
    return (each.to(device) for each in found)
