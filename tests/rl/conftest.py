"""Test environments are found by name, in this process and in those that tests start."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="session")
def _importable():
    pytest.importorskip("gymnasium")
    sys.path.insert(0, HERE)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = HERE + (os.pathsep + before if before else "")
    yield
    sys.path.remove(HERE)
    os.environ["PYTHONPATH"] = before or ""
    if before is None:
        del os.environ["PYTHONPATH"]
