"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIXTURES = ROOT / "tests" / "fixtures"


@pytest.fixture(scope="session")
def fixture():
    """Returns a function that loads tests/fixtures/{name}.pt; a missing file is an error, never a skip."""
    return lambda name: torch.load(FIXTURES / f"{name}.pt", weights_only=True)
