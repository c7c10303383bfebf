"""What all tests share."""

import logging
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIXTURES = ROOT / "tests" / "fixtures"

from autoregressive.runtime.log import LOGGER  # noqa: E402


@pytest.fixture(scope="session")
def fixture():
    """Returns a function that loads tests/fixtures/{name}.pt; a missing file is an error."""
    return lambda name: torch.load(FIXTURES / f"{name}.pt", weights_only=True)


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's fixture, which sees the log whatever an earlier test has opened."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, LOGGER.name)
    return caplog


def pytest_addoption(parser):
    parser.addoption("--run-long", action="store_true",
                     help="also run the tests marked long (scripts/test.sh --all)")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run by scripts/test.sh --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: scripts/test.sh --all runs it"))
