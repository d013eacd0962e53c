"""The command line called in this process, for the tests of its verbs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from finetuneflow import cli


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as exactly one JSON document."""
        return json.loads(self.out)


Ftf = Callable[..., Answer]


@pytest.fixture
def ftf(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ftf:
    """Calls the entry point in this process, as a pipe would see it; everything written to both streams is kept."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["ftf", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return call
