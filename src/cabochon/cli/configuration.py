"""Settings from a YAML file and from flags: frozen dataclasses, the same names in both.

A field annotated with `FLAT` holds a group whose fields stand among its owner's, in the file and
among the flags (`--learning-rate`, not `--optimizer.learning-rate`). A plain value where a group is
expected goes to the group's first field (`model: gemma2-nano`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from cabochon.cli.words import unknown
from cabochon.core.errors import ConfigError

__all__ = [
    "FLAT",
    "Invocation",
    "build",
    "difference",
    "dump",
    "load",
    "mapping",
    "parse",
    "plain",
    "read",
    "replaced",
]

S = TypeVar("S")

FLAT = tyro.conf.arg(name="")
"""`Annotated[Group, FLAT]`: the group's fields stand among those of the class that holds it."""

MARKERS = (tyro.conf.FlagCreatePairsOff,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invocation(Generic[S]):
    """A verb's settings, and the two flags that are not part of them."""

    config: Path | None = None
    """A YAML file of these same names (with _ for -); flags given beside it win."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""
    settings: Annotated[S, FLAT]


def read(
    cls: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    names: Mapping[str, str] | None = None,
) -> Invocation[S]:
    """The settings from `--config FILE`, where given, with the flags over them.

    Args:
        cls: a frozen dataclass; fields without a default must come from the file or the flags.
        argv: the words after the verb.
        prog: how the verb is called, for messages.
        description: what `--help` says first.
        names: what the file may say beside the settings, with the value it must have: a run's
            config.yaml names its algorithm.

    Raises:
        ConfigError: the file cannot be read as settings, or a flag's value is out of range.
        SystemExit: the flags are wrong (code 2) or `--help` was asked for (code 0).
    """
    _refuse_empty_lists(cls, argv)
    path = _config_path(argv)
    settings = None
    if path is not None:
        content = mapping(_text(path), str(path))
        for name, expected in (names or {}).items():
            if content.pop(name, expected) != expected:
                raise ConfigError(f"{path} is not for {prog}: its {name} is not {expected}")
        settings = build(cls, content, origin=str(path), partial=True)
    kind: Any = Invocation[cls]  # type: ignore[valid-type]
    default = None if settings is None else kind(config=path, settings=settings)
    return parse(kind, argv, prog=prog, description=description, default=default)


def parse(
    cls: type[S], argv: Sequence[str], *, prog: str, description: str, default: S | None = None
) -> S:
    """The flags alone, as a `cls`.

    Raises:
        ConfigError: a flag is given twice or without its value, or its value is out of range.
        SystemExit: the flags are wrong (code 2) or `--help` was asked for (code 0).
    """
    _refuse_repeats(argv)
    _refuse_empty_lists(cls, argv)
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        result: S = tyro.cli(
            cls, args=list(argv), prog=prog, description=description, config=MARKERS, **extra
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prog}: {error}") from error
    return result


def load(cls: type[S], text: str, *, origin: str) -> S:
    """A `cls` from YAML text.

    Args:
        cls: a dataclass.
        text: a YAML mapping.
        origin: the file's name, for messages.

    Raises:
        ConfigError: not YAML, not a mapping, an unknown key (the nearest is named), a wrong type.
    """
    return build(cls, mapping(text, origin), origin=origin)


def mapping(text: str, origin: str) -> dict[str, Any]:
    """The keys and values of YAML text.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        content = yaml.load(text, Loader=_NothingTwice)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{origin} holds {type(content).__name__}; expected lines of `key: value`"
        )
    return dict(content)


def build(
    cls: type[S], content: Mapping[str, Any], *, origin: str, path: str = "", partial: bool = False
) -> S:
    """A `cls` from plain values.

    Args:
        cls: a dataclass.
        content: values by field name.
        origin: where they come from, for messages.
        path: of the group they are, with a point at its end.
        partial: leave fields without default that are absent to the flags.

    Raises:
        ConfigError: an unknown key (the nearest is named), a missing one, a wrong type.
    """
    names = _names(cls)
    for key in content:
        if key not in names:
            raise ConfigError(
                f"{origin}: " + unknown("key", f"{path}{key}", _prefixed(path, names))
            )
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        group = _group(hints[field.name])
        if group is not None and _is_flat(hints[field.name]):
            inner = {key: content[key] for key in _names(group) if key in content}
            made = build(group, inner, origin=origin, path=path, partial=partial)
            values[field.name] = _with_defaults_of(field, made, inner)
        elif field.name in content:
            value = content[field.name]
            if group is not None:
                if not isinstance(value, Mapping):
                    value = {dataclasses.fields(group)[0].name: value}
                at = f"{path}{field.name}."
                values[field.name] = build(group, value, origin=origin, path=at, partial=partial)
            else:
                values[field.name] = _value(
                    hints[field.name], value, f"{origin}: {path}{field.name}"
                )
        elif _required(field):
            if not partial:
                raise ConfigError(f"{origin}: {path}{field.name} is missing")
            values[field.name] = tyro.MISSING
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{origin}: {path}{error}") from error


def plain(settings: Any) -> dict[str, Any]:
    """The settings as a mapping of plain values that `build` reads back."""
    result: dict[str, Any] = {}
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            inner = plain(value)
            result.update(inner if _is_flat(hints[field.name]) else {field.name: inner})
        else:
            result[field.name] = TypeAdapter(Any).dump_python(value, mode="json")
            if isinstance(value, tuple):
                result[field.name] = list(value)
    return result


def replaced(settings: S, values: Mapping[str, Any]) -> S:
    """The settings with other values for some of their keys, those of flat groups included."""
    changes: dict[str, Any] = {}
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        if field.name in values:
            changes[field.name] = values[field.name]
        elif _is_flat(hints[field.name]):
            changes[field.name] = replaced(getattr(settings, field.name), values)
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def dump(settings: Any, **first: Any) -> str:
    """YAML text that `load` reads back to equal settings, with the keys of `first` before them."""
    return yaml.safe_dump({**first, **plain(settings)}, sort_keys=False, allow_unicode=True)


class _NothingTwice(yaml.SafeLoader):
    """A key given twice would silently lose its first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value is not the same: `key: before -> after`."""
    lines = []
    for key in [*before, *(k for k in after if k not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{line}" for line in difference(old, new)]
        elif old != new:
            lines.append(f"{key}: {old!r} -> {new!r}")
    return lines


def _value(hint: Any, value: Any, where: str) -> Any:
    """One value, coerced to its type: 1e-4 is text to YAML and a number to us."""
    if get_origin(hint) is tuple and not isinstance(value, list | tuple):
        value = [value]
    parts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(part, bool) for part in parts) and not _takes_bool(hint):
        raise ConfigError(f"{where}: {value!r} cannot be used: neither true nor false has a place")
    try:
        result = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        raise ConfigError(f"{where}: {value!r} cannot be used: {reasons}") from error
    if isinstance(result, float) and math.isnan(result):
        raise ConfigError(f"{where}: {value!r} is not a number")
    return result


def _takes_bool(hint: Any) -> bool:
    return hint in (bool, Any) or any(map(_takes_bool, get_args(hint)))


def _group(hint: Any) -> Any | None:
    """The dataclass that a field holds; None for plain values."""
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return inner if dataclasses.is_dataclass(inner) else None


def _is_flat(hint: Any) -> bool:
    return get_origin(hint) is Annotated and FLAT in get_args(hint)[1:]


def _names(cls: Any) -> list[str]:
    """Every key that may stand in the place of a `cls`, those of its flat groups included."""
    hints = get_type_hints(cls, include_extras=True)
    names: list[str] = []
    for field in dataclasses.fields(cls):
        flat = _is_flat(hints[field.name])
        names += _names(_group(hints[field.name])) if flat else [field.name]
    return names


def _prefixed(path: str, names: Sequence[str]) -> list[str]:
    return [f"{path}{name}" for name in names]


def _with_defaults_of(field: dataclasses.Field[Any], made: Any, given: Mapping[str, Any]) -> Any:
    """A flat group in which what was not given is as its owner has it, not its own class."""
    if field.default_factory is dataclasses.MISSING:
        return made
    default = field.default_factory()
    absent = [each.name for each in dataclasses.fields(made) if each.name not in given]
    hints = get_type_hints(type(made), include_extras=True)
    kept = {name: getattr(default, name) for name in absent if not _is_flat(hints[name])}
    return dataclasses.replace(made, **kept)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _config_path(argv: Sequence[str]) -> Path | None:
    for index, word in enumerate(argv):
        if word == "--config":
            if index + 1 == len(argv):
                raise ConfigError("--config needs a file after it")
            return Path(argv[index + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no settings file at {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as settings: {error.strerror}") from error


def _refuse_repeats(argv: Sequence[str]) -> None:
    """A flag given twice would silently lose its first value."""
    seen: set[str] = set()
    for word in argv:
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and len(flag) > 2:
            if flag in seen:
                raise ConfigError(f"{flag} is given twice; give it once, with all its values")
            seen.add(flag)


def _refuse_empty_lists(cls: Any, argv: Sequence[str]) -> None:
    """A list of no values would silently stand for the flag's absence."""
    lists = _list_flags(cls)
    for word, after in zip_longest(argv, argv[1:], fillvalue="--"):
        if word.replace("_", "-") in lists and after.startswith("--"):
            raise ConfigError(f"{word} needs at least one value after it")


def _list_flags(cls: Any) -> set[str]:
    hints = get_type_hints(get_origin(cls) or cls, include_extras=True)
    flags: set[str] = set()
    for name, hint in hints.items():
        if get_origin(hint) is tuple:
            flags.add(f"--{name.replace('_', '-')}")
        elif (group := _group(hint)) is not None and _is_flat(hint):
            flags |= _list_flags(group)
    return flags
