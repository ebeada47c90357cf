"""The folder of a dataset, as TensorFlow Datasets lays it out.

    FOLDER/
      features.json               what an episode consists of (`rlds.spec`)
      dataset_info.json           format, splits, how many episodes each shard holds
      NAME-SPLIT.FORMAT-00000     a closed shard
      NAME-SPLIT.unfinished       while a writer is at work, or where one was killed
      cabochon.json               what only we know: alignment, what kind of episodes

`dataset_info.json` lists closed shards alone and is replaced whole, so whatever happens to a
writer, what is listed is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cabochon.core.errors import DataError, FolderError
from cabochon.data.rlds.spec import Spec
from cabochon.files import write_whole

__all__ = [
    "DatasetInfo",
    "SplitInfo",
    "folder_of",
    "is_dataset",
    "journal_path",
    "read_info",
    "read_notes",
    "read_spec",
    "shard_path",
    "write_info",
]

FEATURES, INFO, NOTES = "features.json", "dataset_info.json", "cabochon.json"
GROWING = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
"""Names that do not say how many shards there are, so that one can be added."""
STANDARD = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split: its shards and how many episodes each holds."""

    name: str
    template: str = GROWING
    shard_lengths: tuple[int, ...] = ()
    bytes: int = 0
    """Of all records together."""

    @property
    def episodes(self) -> int:
        """In all closed shards."""
        return sum(self.shard_lengths)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of `dataset_info.json`."""

    name: str
    version: str
    format: str
    splits: Mapping[str, SplitInfo]
    other: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says; kept as it is."""

    def with_split(self, split: SplitInfo) -> DatasetInfo:
        """The same with this split, new or in the place of its namesake."""
        return replace(self, splits={**self.splits, split.name: split})


def is_dataset(path: str | Path, *, below: bool = False) -> bool:
    """True where a dataset lies at `path`, or up to three levels below."""
    place = Path(path)
    return _lies_at(place) or (below and bool(_lie_below(place)))


def folder_of(path: str | Path) -> Path:
    """The folder with `features.json` at `path`, or the only one up to three levels below.

    Raises:
        FolderError: there is none, or there are several.
    """
    place = Path(path)
    if _lies_at(place):
        return place
    found = _lie_below(place)
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(place)) for each in found[:5])
        raise FolderError(f"{place} holds several datasets: {names}; name one of them")
    if not found:
        raise FolderError(f"{place} is no RLDS dataset: it has no {FEATURES} with {INFO} beside it")
    return found[0]


def _lies_at(place: Path) -> bool:
    return (place / FEATURES).is_file() and (place / INFO).is_file()


def _lie_below(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    files = (file for depth in ("*", "*/*", "*/*/*") for file in place.glob(f"{depth}/{FEATURES}"))
    return sorted(file.parent for file in files if _lies_at(file.parent))


def read_spec(folder: Path) -> Spec:
    """From `features.json`.

    Raises:
        DataError: it is not what it should be; the file is named.
    """
    try:
        return Spec.from_json(_json(folder / FEATURES))
    except DataError as error:
        raise DataError(f"{folder / FEATURES}: {error}") from error


def read_notes(folder: Path) -> dict[str, Any]:
    """From `cabochon.json`; empty where another program wrote the dataset."""
    place = folder / NOTES
    return _json(place) if place.is_file() else {}


def read_info(folder: Path) -> DatasetInfo:
    """From `dataset_info.json`.

    Raises:
        DataError: it is damaged or lacks what is needed.
    """
    place = folder / INFO
    content = _json(place)
    try:
        splits = [
            SplitInfo(
                name=each["name"],
                template=str(each.get("filepathTemplate") or STANDARD),
                shard_lengths=tuple(_count(length) for length in each.get("shardLengths", [])),
                bytes=int(each.get("numBytes", 0)),
            )
            for each in content.pop("splits", [])
        ]
        return DatasetInfo(
            name=content.pop("name"),
            version=content.pop("version", "1.0.0"),
            format=content.pop("fileFormat", "tfrecord"),
            splits={split.name: split for split in splits},
            other=content,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place} is not as TensorFlow Datasets writes it: {error!r}") from None


def write_info(
    folder: Path,
    info: DatasetInfo,
    *,
    spec: Spec | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Replaces `dataset_info.json`; the other two files come first where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    if spec is not None:
        write_whole(folder / FEATURES, json.dumps(spec.to_json(), indent=4) + "\n")
    if notes is not None:
        write_whole(folder / NOTES, json.dumps(dict(notes), indent=1) + "\n")
    content = {
        **info.other,
        "name": info.name,
        "version": info.version,
        "fileFormat": info.format,
        "splits": [
            {
                "name": split.name,
                "filepathTemplate": split.template,
                "shardLengths": [str(length) for length in split.shard_lengths],
                "numBytes": str(split.bytes),
            }
            for split in info.splits.values()
        ],
    }
    write_whole(folder / INFO, json.dumps(content, indent=2) + "\n")


def shard_path(folder: Path, info: DatasetInfo, split: SplitInfo, index: int) -> Path:
    """Where a shard lies.

    Raises:
        DataError: the template of the split's files has a part that is not known.
    """
    shards = len(split.shard_lengths)
    try:
        name = split.template.format(
            DATASET=info.name,
            SPLIT=split.name,
            FILEFORMAT=info.format,
            SHARD_INDEX=f"{index:05d}",
            NUM_SHARDS=f"{shards:05d}",
            SHARD_X_OF_Y=f"{index:05d}-of-{shards:05d}",
        )
    except (KeyError, IndexError, ValueError):
        raise DataError(f"the file names {split.template!r} of {folder} are not known") from None
    if Path(name).name != name:
        raise DataError(f"{folder}: the files of a split lie beside {INFO}, not at {name}")
    return folder / name


def journal_path(folder: Path, info: DatasetInfo, split: str) -> Path:
    """Where a writer keeps what is not in a closed shard yet."""
    return folder / f"{info.name}-{split}.unfinished"


def _count(text: Any) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{number} is no number of episodes")
    return number


def _json(place: Path) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{place} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{place} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{place} holds a {type(content).__name__}, expected an object")
    return content
