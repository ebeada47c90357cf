from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cabochon.core import Step
from cabochon.core.errors import MissingExtra
from cabochon.training import meters
from cabochon.training.metrics import Record


def record(index: int, **report: float) -> Record:
    return Record(
        step=Step(
            index=index,
            loss=4.0 - index,
            grad_norm=0.5,
            weight=32.0,
            learning_rate=0.25,
            report=report,
        ),
        seconds=0.5,
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads event files as TensorBoard does: length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        place = 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            place += 12 + length + 4
    return found


def test_tensorboard_event_files_hold_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with meters.tensorboard(tmp_path) as meter:
        for i in range(3):
            meter(record(i, kl=0.125 * i, broken=math.nan))
    found = scalars(tmp_path)
    assert found["loss"] == [(0, 4.0), (1, 3.0), (2, 2.0)]
    assert found["kl"] == [(0, 0.0), (1, 0.125), (2, 0.25)]
    assert found["units_per_second"] == [(0, 64.0), (1, 64.0), (2, 64.0)]
    assert set(found) == {
        "loss",
        "grad_norm",
        "weight",
        "learning_rate",
        "kl",
        "seconds",
        "units_per_second",
    }


def test_trackio_keeps_every_number_in_its_local_database(tmp_path: Path) -> None:
    """In a process of its own: trackio reads the folder from the environment when imported."""
    pytest.importorskip("trackio")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_meters import meters, record\n"
        "with meters.trackio('shapes', 'first', {'width': 8}) as meter:\n"
        "    [meter(record(i, kl=0.5)) for i in range(3)]\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
    database = sqlite3.connect(tmp_path / "shapes.db")
    rows = database.execute("select step, metrics from metrics order by step").fetchall()
    database.close()
    assert [step for step, _ in rows] == [0, 1, 2]
    assert [json.loads(line)["loss"] for _, line in rows] == [4.0, 3.0, 2.0]


@pytest.mark.parametrize("package", ["tensorboardX", "trackio"])
def test_where_the_package_is_absent_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    meter = (
        meters.tensorboard(tmp_path)
        if package == "tensorboardX"
        else meters.trackio("shapes", "first", {})
    )
    with pytest.raises(MissingExtra, match=rf"{package}; install it: pip install 'cabochon\[track"):
        meter.__enter__()
