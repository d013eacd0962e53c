"""One finished run per method, made once; tests work on copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_dir import make_run

RunMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """`finished_run(kind, **settings)`: the folder of such a run, built at its first use. Not to be written to."""
    made: dict[str, Path] = {}

    def find(kind: str = "lora", **settings: object) -> Path:
        key = f"{kind} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_run(tmp_path_factory.mktemp("run"), kind, **settings)  # type: ignore[arg-type]
        return made[key]

    return find


@pytest.fixture
def new_run(finished_run: RunMaker, tmp_path: Path) -> RunMaker:
    """The same as a copy of the test's own (the base model is shared)."""

    def copy(kind: str = "lora", **settings: object) -> Path:
        source = finished_run(kind, **settings)
        return Path(shutil.copytree(source, tmp_path / "runs" / source.name))

    return copy
