"""What `cabochon data inspect` shows of a dataset of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from cabochon.cli.drawing import draw
from cabochon.cli.output import answer, console, say
from cabochon.core.errors import DataError, TokenizerMismatch
from cabochon.data.rlds.filmstrip import save_filmstrip
from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.records import Episode, Ragged, flat
from cabochon.data.rlds.rollouts import KIND
from cabochon.data.rlds.spec import Feature, leaf_features
from cabochon.data.rlds.validation import findings
from cabochon.data.tokenizer import Tokenizer

__all__ = ["Chosen", "inspect_episodes"]

_MOST_EPISODES = 2000
"""Of so many, lengths and returns are shown; what is more is said."""
_MOST_FINDINGS = 8
_MOST_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What to show of a dataset."""

    path: str
    split: str
    index: int
    tokens: int
    filmstrip: str
    last_step_valid: bool | None
    """None: as the dataset's own notes say."""
    json: bool


def inspect_episodes(chosen: Chosen, tokenizer: Tokenizer | None) -> None:
    """Counts, lengths, returns, findings, and one episode.

    Raises:
        DataError: the dataset is damaged, or the split or episode is not there.
        TokenizerMismatch: the rollouts are of another tokenizer.
    """
    valid = chosen.last_step_valid
    episodes = Episodes(chosen.path, chosen.split, last_step_valid=valid, keep_invalid=True)
    told = _of_dataset(chosen, episodes)
    if not 0 <= chosen.index < len(episodes):
        if not chosen.json:
            _print_dataset(told)
        raise DataError(
            f"{chosen.split} has {len(episodes)} episodes, from 0; there is no {chosen.index}"
        )
    episode = episodes[chosen.index]
    sample = _of_episode(episode, chosen.index)
    spoken = episodes.notes.get("kind") == KIND
    if spoken:
        sample |= _of_rollout(episode, tokenizer, episodes.notes)
    if chosen.filmstrip:
        save_filmstrip(episode, Path(chosen.filmstrip))
        sample["filmstrip"] = chosen.filmstrip
    if chosen.json:
        answer({**told, "sample": sample})
        return
    _print_dataset(told)
    _print_sample(episode, sample, tokenizer if spoken else None, chosen.tokens)


def _of_dataset(chosen: Chosen, episodes: Episodes) -> dict[str, Any]:
    plain = Episodes(
        chosen.path,
        chosen.split,
        last_step_valid=episodes.last_step_valid,
        images=False,
        keep_invalid=True,
    )
    lengths, returns, terminated, invalid = [], [], 0, 0
    wrong = [f"{each.split}: {each.text()}" for each in episodes.unfinished]
    for number in range(min(len(plain), _MOST_EPISODES)):
        try:
            episode = plain[number]
        except DataError as error:
            wrong.append(f"episode {number}: {error}")
            continue
        wrong += [f"episode {number}: {finding}" for finding in findings(episode)]
        lengths.append(episode.transitions)
        terminated += episode.terminated
        invalid += episode.invalid
        if "reward" in episode.steps:
            returns.append(episode.total_reward())
    return {
        "path": chosen.path,
        "name": episodes.info.name,
        "version": episodes.info.version,
        "format": episodes.info.format,
        "splits": {
            name: {"episodes": split.episodes, "shards": len(split.shard_lengths)}
            for name, split in episodes.info.splits.items()
        },
        "features": _features(episodes),
        "split": chosen.split,
        "episodes": len(episodes),
        "looked_at": len(lengths),
        "transitions": sum(lengths),
        "length": _spread(lengths),
        "return": _spread(returns),
        "terminated": terminated,
        "invalid": invalid,
        "unfinished": {each.split: each.episodes for each in episodes.unfinished},
        "notes": episodes.notes,
        "findings": len(wrong),
        "first_findings": wrong[:_MOST_FINDINGS],
    }


def _features(episodes: Episodes) -> dict[str, str]:
    steps = {f"steps/{name}": each for name, each in leaf_features(episodes.spec.steps).items()}
    every: dict[str, Feature] = {**steps, **leaf_features(episodes.spec.metadata)}
    return {name: _words(feature) for name, feature in every.items()}


def _words(feature: Any) -> str:
    """Array int64 (4,), Image (64, 64, 3), Rows of Text."""
    parts = [type(feature).__name__]
    if hasattr(feature, "feature"):
        return f"{parts[0]} of {_words(feature.feature)}"
    parts += [getattr(feature, "dtype", "")]
    parts += [str(feature.shape)] if getattr(feature, "shape", ()) else []
    return " ".join(part for part in parts if part)


def _spread(values: list[Any]) -> dict[str, float]:
    """Least, mean and most; nothing where there is nothing, or a value that is not finite."""
    if not values or not np.isfinite(values).all():
        return {}
    return {
        "least": float(min(values)),
        "mean": float(np.mean(values)),
        "most": float(max(values)),
    }


def _of_episode(episode: Episode, index: int) -> dict[str, Any]:
    reward = _finite(episode.total_reward()) if "reward" in episode.steps else None
    return {
        "index": index,
        "transitions": episode.transitions,
        "return": reward,
        "ended": "by the environment" if episode.terminated else "cut short",
        "metadata": _plain(episode.metadata),
    }


def _of_rollout(
    episode: Episode, tokenizer: Tokenizer | None, notes: Mapping[str, Any]
) -> dict[str, Any]:
    if tokenizer is not None and tokenizer.fingerprint() != notes["tokenizer"]:
        raise TokenizerMismatch(
            f"the rollouts are of the tokenizer {notes['tokenizer']}, got "
            f"{tokenizer.fingerprint()}; give the one of the model that wrote them"
        )
    prompt = np.asarray(episode.metadata["prompt"]).tolist()
    tokens = episode.steps["action"][:-1].tolist()
    versions = sorted(set(episode.steps["weights_version"][:-1].tolist()))
    found: dict[str, Any] = {
        "prompt": prompt,
        "completion": tokens,
        "logprob": _finite(float(episode.steps["logprob"][:-1].sum())),
        "weights_versions": versions,
    }
    if tokenizer is not None:
        found["prompt_text"] = tokenizer.decode(prompt)
        found["completion_text"] = tokenizer.decode(tokens)
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _plain(value: Any) -> Any:
    """What JSON can hold; arrays of more than a few numbers by their shape."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    array = np.asarray(value)
    if array.size > 16:
        return f"{array.dtype} {array.shape}"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return str(array.tolist())
    plain = array.tolist()
    return [_plain(each) for each in plain] if array.dtype == object else plain


def _print_dataset(told: Mapping[str, Any]) -> None:
    screen = console(stderr=False)

    def line(name: str, text: str) -> None:
        screen.print(f"  {name:<12} {text}", markup=False)

    title = f"{told['name']} {told['version']} ({told['format']})"
    screen.print(f"{told['path']}: {title}", style="bold", markup=False)
    for name, split in told["splits"].items():
        line(name, f"{split['episodes']:,} episodes in {split['shards']} shards")
    for name, words in told["features"].items():
        line("", f"{name}: {words}")
    beyond = told["episodes"] - told["looked_at"]
    line(
        "looked at",
        f"{told['looked_at']:,} episodes" + (f" of {told['episodes']:,}" * (beyond > 0)),
    )
    line("transitions", f"{told['transitions']:,}")
    for name in ("length", "return"):
        if told[name]:
            least, mean, most = (f"{told[name][key]:.4g}" for key in ("least", "mean", "most"))
            line(name, f"{mean} on average, {least} to {most}")
    line("ended", f"{told['terminated']:,} by the environment; {told['invalid']:,} invalid")
    for finding in told["first_findings"]:
        line("FINDING", finding)
    if told["findings"] > _MOST_FINDINGS:
        line("", f"and {told['findings'] - _MOST_FINDINGS:,} findings more")


def _print_sample(
    episode: Episode, sample: Mapping[str, Any], tokenizer: Tokenizer | None, most: int
) -> None:
    screen = console(stderr=False)
    screen.print(
        f"episode {sample['index']}: {sample['transitions']} transitions, return "
        f"{sample['return']}, {sample['ended']}",
        style="bold",
        markup=False,
    )
    for name, value in flat(sample["metadata"]).items():
        screen.print(f"  {name}: {value}", markup=False)
    if "filmstrip" in sample:
        say(f"the filmstrip is in {sample['filmstrip']}")
    if "completion" not in sample:
        for row in range(min(len(episode), _MOST_STEPS)):
            screen.print(f"  step {row}: {_step_text(episode, row)}", markup=False)
        return
    screen.print(
        f"  log-probability {sample['logprob']}, weights {sample['weights_versions']}",
        markup=False,
    )
    if tokenizer is None:
        screen.print("  (give --tokenizer FOLDER to see the text)", markup=False)
        return
    prompt, tokens = sample["prompt"], sample["completion"]
    learned = [False] * len(prompt) + [True] * len(tokens)
    say(f"{'green' if screen.is_terminal else '[bracketed]'} tokens are the actions")
    colour = screen.is_terminal
    screen.print(Text("---"))
    screen.print(draw(tokenizer, prompt + tokens, learned, most=most, colour=colour))


def _step_text(episode: Episode, row: int) -> str:
    """What one step holds, in a line: small things as they are, large ones by their shape."""
    parts = []
    for name, column in flat(episode.steps).items():
        value = column[row]
        if isinstance(value, Ragged):
            parts.append(f"{name} {len(value)} rows")
        elif isinstance(value, str | bytes):
            parts.append(f"{name} {_plain(value)!r}")
        else:
            array = np.asarray(value)
            rounded = np.round(array.astype(float), 4) if array.dtype.kind == "f" else array
            shown = f"{array.dtype} {array.shape}" if array.size > 8 else rounded.tolist()
            if shown is not False:
                parts.append(f"{name} {shown}")
    return ", ".join(parts)
