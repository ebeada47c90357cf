"""Settings from files and flags: the same names, nothing ignored, nothing half-read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from cabochon.cli.configuration import FLAT, build, difference, dump, load, plain, read
from cabochon.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Engine:
    power: float = 1.0
    fuels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ConfigError(f"power must be above 0, got {self.power}")


@dataclass(frozen=True, kw_only=True)
class Body:
    name: str = "open"
    doors: int | None = None


@dataclass(frozen=True, kw_only=True)
class Car:
    engine: Annotated[Engine, FLAT] = field(default_factory=Engine)
    body: Body = field(default_factory=Body)
    gear: Literal["manual", "automatic"] = "manual"
    pair: tuple[float, float] = (0.5, 0.5)
    where: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Named:
    title: str
    size: int = 1


def from_flags(*words: str) -> Car:
    return read(Car, words, prog="car", description="A car.").settings


def test_what_is_dumped_is_read_back_equal() -> None:
    car = Car(
        engine=Engine(power=1e-5, fuels=("wood", "peat")),
        body=Body(name="sedan", doors=3),
        where=Path("garage"),
        pair=(0.25, 0.75),
    )
    assert load(Car, dump(car), origin="file") == car


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "car.yaml"
    file.write_text("power: 3\nbody: {doors: 4}\nfuels: [wood]\n")
    car = from_flags("--config", str(file), "--power", "5", "--body.name", "van")
    assert car == Car(engine=Engine(power=5.0, fuels=("wood",)), body=Body(name="van", doors=4))


def test_a_number_without_a_decimal_point_is_a_number() -> None:
    """YAML 1.1 reads 1e-4 as text."""
    assert load(Car, "power: 1e-4", origin="file").engine.power == 1e-4


def test_a_plain_value_goes_to_the_first_field_of_a_group() -> None:
    assert load(Car, "body: van\nfuels: wood", origin="file") == Car(
        body=Body(name="van"), engine=Engine(fuels=("wood",))
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("powr: 3", "file: unknown key 'powr': did you mean 'power'?"),
        ("body: {dors: 3}", "file: unknown key 'body.dors': did you mean 'body.doors'?"),
        ("engine: {power: 3}", "file: unknown key 'engine'"),
        ("xyzzy: 1", "known are: body, fuels, gear, pair, power, where"),
        ("power: strong", "file: power: 'strong' cannot be used"),
        ("power: -1", "power must be above 0, got -1.0"),
        ("power: .nan", "power: nan is not a number"),
        ("gear: 7", "file: gear: 7 cannot be used"),
        ("pair: [1]", "file: pair: [1] cannot be used"),
        ("[1, 2]", "file holds list; expected lines of `key: value`"),
        ("a: [", "file is not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(Car, text, origin="file")
    assert said in str(error.value)


def test_what_has_no_default_comes_from_file_or_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="title is missing"):
        build(Named, {}, origin="file")
    file = tmp_path / "n.yaml"
    file.write_text("size: 3")
    words = ("--config", str(file), "--title", "t")
    assert read(Named, words, prog="n", description="").settings == Named(title="t", size=3)
    with pytest.raises(SystemExit) as stop:
        read(Named, words[:2], prog="n", description="")
    assert stop.value.code == 2
    assert "--title" in capsys.readouterr().err


def test_a_wrong_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        from_flags("--powr", "3")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "--power" in captured.err
    assert captured.out == ""


def test_a_flag_out_of_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="power must be above 0, got -1"):
        from_flags("--power", "-1")


def test_a_flag_given_twice_is_refused_rather_than_half_forgotten() -> None:
    with pytest.raises(ConfigError, match="--fuels is given twice"):
        from_flags("--fuels", "wood", "--fuels", "peat")


def test_a_settings_file_that_is_absent_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no settings file at"):
        from_flags("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"power: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        from_flags("--config", str(tmp_path / "b.yaml"))
    with pytest.raises(ConfigError, match="needs a file"):
        from_flags("--config")


def test_differences_are_shown_key_by_key() -> None:
    before, after = plain(Car()), plain(Car(body=Body(doors=2), engine=Engine(power=2.0)))
    assert difference(before, after) == ["power: 1.0 -> 2.0", "body.doors: None -> 2"]
    assert difference(before, before) == []


def _fast() -> Engine:
    return Engine(power=12.0)


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A car whose engine has defaults of its own."""

    engine: Annotated[Engine, FLAT] = field(default_factory=_fast)
    team: str = ""


def test_a_file_that_leaves_something_out_leaves_it_as_the_owner_has_it(tmp_path: Path) -> None:
    path = tmp_path / "racer.yaml"
    path.write_text("team: red\n")
    for text in ("team: red\n", "{}\n"):
        assert load(Racer, text, origin="x").engine == _fast()
    read_settings = read(Racer, ["--config", str(path)], prog="p", description="").settings
    assert read_settings.engine == _fast()
