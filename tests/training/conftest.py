"""Fixtures of the training tests: one tiny base model per session, one bench per test."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from models.tiny import save_tiny
from training.workbench import Bench, sums, write_rows


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", hidden=32)
    gc.collect()
    gc.freeze()  # a trainer collects garbage at each start: half a second when it walks through all of torch
    return made


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report costs more than a tiny run; tests marked `report` want it."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("finetuneflow.training.run._write_report", lambda run_dir, emit: None)


@pytest.fixture
def with_report() -> None:
    """Ask for this fixture to have the report drawn."""


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Path) -> Bench:
    return Bench(tmp_path, tiny_base, write_rows(tmp_path / "sums.jsonl", sums(30)))
