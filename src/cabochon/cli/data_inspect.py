"""`cabochon data inspect PATH`: what is in a file, a packed folder, episodes or a run's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.text import Text

from cabochon.cli.configuration import mapping, parse
from cabochon.cli.data_episodes import Chosen, inspect_episodes
from cabochon.cli.drawing import Drawn, documents_in, draw
from cabochon.cli.machine import tokenizer_of
from cabochon.cli.output import answer, console, say
from cabochon.cli.recipe import recipe_of
from cabochon.cli.rows import chats_of, documents_of, encode_conversation, is_packed
from cabochon.core.errors import ConfigError, DataError, FolderError
from cabochon.data.packed import Packed
from cabochon.data.readers import read_records
from cabochon.data.rlds.layout import is_dataset
from cabochon.data.teacher_cache import TeacherCache, is_teacher_cache
from cabochon.data.tokenizer import Tokenizer

__all__ = ["InspectSettings", "main"]


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What to look at, and through which tokenizer."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A packed folder, a teacher cache, a dataset of episodes, a file or folder of text or records,
    a run directory, or `stdlib`."""
    tokenizer: str = ""
    """A tokenizer or model folder; without one there are characters but no tokens."""
    field: str = "text"
    """The field of a record that holds its text."""
    index: int = 0
    """Which row (packed), document or episode to draw, counted from 0."""
    tokens: int = 200
    """The most tokens to draw."""
    split: str = "train"
    """Of episodes: which ones, as `train`, `train[10:20]` or `train[:50%]`."""
    filmstrip: str = ""
    """Of episodes with pictures: write those of the episode, side by side, to this PNG file."""
    last_step_valid: bool = False
    """Of episodes: the last step holds a real action and reward, and no observation follows it."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    counts: dict[str, Any]
    sample: list[Drawn]
    text: str = ""
    """Of the sample, where there is no tokenizer to draw it with."""


def main(argv: Sequence[str]) -> int:
    """Counts, then draws one row or document with its loss mask."""
    settings = parse(
        InspectSettings, argv, prog="cabochon data inspect", description="Look at data."
    )
    if settings.tokens < 1:
        raise ConfigError(f"tokens must be at least 1, got {settings.tokens}")
    tokenizer = tokenizer_of(settings.tokenizer) if settings.tokenizer else None
    if (Path(settings.path) / "config.yaml").is_file():
        tokenizer = tokenizer or tokenizer_of(_of_run(settings.path)["tokenizer"])
        for name in _of_run(settings.path)["data"]:
            _show(settings, _look(name, settings, tokenizer), tokenizer, name)
        return 0
    if settings.path != "stdlib" and is_dataset(settings.path, below=True):
        inspect_episodes(_episodes(settings), tokenizer)
        return 0
    if is_teacher_cache(settings.path):
        return _teacher_cache(settings, tokenizer)
    _show(settings, _look(settings.path, settings, tokenizer), tokenizer, settings.path)
    return 0


def _teacher_cache(settings: InspectSettings, tokenizer: Tokenizer | None) -> int:
    """What a cache was made of, and what it loses; its documents are hashes, which nobody reads."""
    cache = TeacherCache.open(settings.path)
    if tokenizer is not None:
        cache.check_tokenizer(tokenizer.fingerprint())
    content = asdict(cache.manifest)
    if settings.json:
        answer({"path": settings.path, **content})
        return 0
    screen = console(stderr=False)
    screen.print(f"{settings.path}", style="bold", markup=False)
    identity, losses = content["identity"], content["losses"]
    shown = {k: identity[k] for k in ("form", "width", "dtype", "vocabulary")}
    for key, value in {**shown, "documents": content["documents"], **losses}.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value}"
        screen.print(f"  {key:<15} {text}", markup=False)
    return 0


def _episodes(settings: InspectSettings) -> Chosen:
    return Chosen(
        path=settings.path,
        split=settings.split,
        index=settings.index,
        tokens=settings.tokens,
        filmstrip=settings.filmstrip,
        last_step_valid=settings.last_step_valid or None,
        json=settings.json,
    )


def _of_run(path: str) -> dict[str, Any]:
    file = Path(path) / "config.yaml"
    content = mapping(file.read_text(encoding="utf-8"), str(file))
    if "data" not in content:
        raise FolderError(f"{path} is a pipeline's folder; name one of its stages")
    recipe_of(str(content.get("algorithm")))
    if not content.get("tokenizer"):
        content["tokenizer"] = content["model"]["source"]
    return content


def _look(name: str, settings: InspectSettings, tokenizer: Tokenizer | None) -> _Found:
    if is_packed(name):
        return _packed(name, settings, tokenizer)
    if name != "stdlib" and _are_chats(name):
        return _chats(name, settings, tokenizer)
    return _documents(name, settings, tokenizer)


def _packed(name: str, settings: InspectSettings, tokenizer: Tokenizer | None) -> _Found:
    packed = Packed.load(name)
    if not 0 <= settings.index < packed.rows:
        raise DataError(f"{name} has rows 0 to {packed.rows - 1}; there is no {settings.index}")
    if tokenizer is not None:
        packed.check_tokenizer(tokenizer.fingerprint())
    counts = {**asdict(packed.manifest), "padding": packed.waste}
    return _Found(counts=counts, sample=list(documents_in(packed.batch([settings.index]), 0)))


def _documents(name: str, settings: InspectSettings, tokenizer: Tokenizer | None) -> _Found:
    documents = list(documents_of(name, settings.field))
    chosen = _chosen(name, documents, settings.index).text
    counts: dict[str, Any] = {
        "documents": len(documents),
        "characters": sum(len(each.text) for each in documents),
        "empty": sum(not each.text.strip() for each in documents),
    }
    if tokenizer is None:
        return _Found(counts=counts, sample=[], text=chosen[: 4 * settings.tokens])
    lengths = [len(ids) for ids in tokenizer.encode_all([each.text for each in documents])]
    counts |= {"tokens": sum(lengths), "longest": max(lengths)}
    ends = {"bos": tokenizer.bos_id is not None, "eos": tokenizer.eos_id is not None}
    ids = tokenizer.encode(chosen, **ends)
    learned = (False, *[True] * (len(ids) - 1))
    return _Found(counts=counts, sample=[Drawn(ids=tuple(ids), learned=learned)])


def _chats(name: str, settings: InspectSettings, tokenizer: Tokenizer | None) -> _Found:
    chats = list(chats_of(name))
    chosen = _chosen(name, chats, settings.index)
    counts: dict[str, Any] = {
        "conversations": len(chats),
        "messages": sum(len(each.messages) for each in chats),
        "characters": sum(len(m.content) for each in chats for m in each.messages),
    }
    if tokenizer is None:
        text = "\n".join(f"{each.role}: {each.content}" for each in chosen.messages)
        return _Found(counts=counts, sample=[], text=text[: 4 * settings.tokens])
    encoded = [encode_conversation(tokenizer, each) for each in chats]
    counts |= {
        "tokens": sum(len(each.ids) for each in encoded),
        "learned": sum(sum(each.mask) for each in encoded),
        "longest": max(len(each.ids) for each in encoded),
    }
    drawn = encoded[settings.index]
    return _Found(counts=counts, sample=[Drawn(ids=drawn.ids, learned=drawn.mask)])


def _are_chats(name: str) -> bool:
    """True if the first record says so; text files hold no records."""
    try:
        first = next(iter(read_records(name)))
    except DataError:
        return False
    return "messages" in first.values or {"prompt", "completion"} <= first.values.keys()


def _chosen(name: str, items: Sequence[Any], index: int) -> Any:
    if not 0 <= index < len(items):
        raise DataError(f"{name} has items 0 to {len(items) - 1}; there is no {index}")
    return items[index]


def _show(settings: InspectSettings, found: _Found, tokenizer: Tokenizer | None, name: str) -> None:
    if settings.json:
        sample: dict[str, Any] = {"text": found.text}
        if found.sample:
            sample = {
                "ids": [id_ for each in found.sample for id_ in each.ids],
                "learned": [flag for each in found.sample for flag in each.learned],
            }
            if tokenizer is not None:
                sample["text"] = tokenizer.decode(sample["ids"])
        answer({"path": name, **found.counts, "sample": sample})
        return
    screen = console(stderr=False)
    screen.print(f"{name}", style="bold", markup=False)
    for key, value in found.counts.items():
        if not isinstance(value, dict):
            shown = f"{value:,}" if isinstance(value, int) else f"{value}"
            screen.print(f"  {key:<12} {shown}", markup=False)
    if tokenizer is None:
        screen.print(found.text or "(give --tokenizer FOLDER to see tokens)", markup=False)
        return
    _draw_all(screen.print, found.sample, tokenizer, settings.tokens, screen.is_terminal)


def _draw_all(
    show: Any, sample: Sequence[Drawn], tokenizer: Tokenizer, most: int, colour: bool
) -> None:
    say(f"{'green' if colour else '[bracketed]'} tokens are learned")
    for number, each in enumerate(sample):
        show(Text(f"--- document {number}, {len(each.ids)} tokens"))
        show(draw(tokenizer, each.ids, each.learned, most=most, colour=colour))
        most -= len(each.ids)
        if most <= 0:
            return
