"""Shared fixtures. Threads are limited before torch is imported: spinning threads on shared cores cost up to tenfold."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest

from face import ftf as ftf  # a fixture of all tests

# On shared cores a slow draw or a slow example says nothing about the code.
hypothesis.settings.register_profile("shared-cores", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared-cores")

SHARED_DATA = Path(os.environ.get("FTF_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED_DATA.is_dir():
        return
    skip = pytest.mark.skip(reason=f"needs the folder of real datasets ({SHARED_DATA}), which a plain clone does not have")
    for item in items:
        if "shared_data" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets, tokenizers, templates and weights (read-only)."""
    return SHARED_DATA
