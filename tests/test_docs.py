"""Promises of the documentation: generated pages are current, every code that is raised is explained."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from finetuneflow.errors import CODES, FineTuneFlowError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "finetuneflow").rglob("*.py"))
spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert spec is not None and spec.loader is not None
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", sorted(generate.PAGES))
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == generate.PAGES[name](), "run: make docs"


def error_classes() -> set[str]:
    found, todo = set(), [FineTuneFlowError]
    while todo:
        todo += (current := todo.pop()).__subclasses__()
        found.add(current.__name__)
    return found


def raised_codes() -> dict[str, str]:
    """Literal first arguments of calls to an error class, with the place of the call."""
    classes, found = error_classes(), {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found[first.value] = f"{path.name}:{node.lineno}"
    return found


def test_every_code_that_is_raised_is_explained() -> None:
    codes = raised_codes()
    assert len(codes) > 30
    missing = {code: place for code, place in codes.items() if code not in CODES}
    assert not missing


def test_every_explained_code_is_used() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "errors.py")
    text += (ROOT / "src" / "finetuneflow" / "errors.py").read_text(encoding="utf-8").split("class FineTuneFlowError")[1]
    unused = [code for code in CODES if f'"{code}"' not in text]
    assert not unused


def test_the_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [p.name for p in (ROOT / "src" / "finetuneflow").iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert rooms and not [room for room in rooms if f"{room}/" not in readme]
