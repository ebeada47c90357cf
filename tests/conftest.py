"""One thread a test (many are faster apart than together) and no network, whatever a test asks."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Public data that lies beside some checkouts; tests that need it skip where it does not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"public test data is not present at {SHARED_DATA}")
    return SHARED_DATA
