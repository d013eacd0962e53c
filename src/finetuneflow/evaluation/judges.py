"""What a suite can ask of an answer: words in it, a pattern, or a judge function by name.

A judge takes the answer (and, if it has a second parameter, the text after the colon of `name:argument`) and
returns True, or False, or a sentence that says what is wrong. Loads no torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from finetuneflow.errors import EvaluationError
from finetuneflow.evaluation.scores import FINAL_PUNCTUATION, words

Judge = Callable[..., bool | str]

REGEX_SECONDS = 2.0
REGEX_CHARS = 20_000
ITEM_SEPARATOR = re.compile(r"\n|[,;，、]|\b(?:and|or|et|ou)\b", re.IGNORECASE)
BULLET = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.)])\s*")
INTRODUCTION = re.compile(r"^[^:\n]*:\s+")


# --- words and patterns ---------------------------------------------------------------------------


def contains_words(answer: str, wanted: str) -> bool:
    """Whether `wanted` stands in the answer as whole words, in any case: "4" is not in "14", "Paris" is in "paris!"."""
    parts = _folded(wanted).split()
    pattern = r"\s+".join(map(re.escape, parts))
    return re.search(_boundary(parts[0][0])[0] + pattern + _boundary(parts[-1][-1])[1], _folded(answer)) is not None


def _boundary(edge: str) -> tuple[str, str]:
    """What may not stand before and after a text that begins or ends with the sign `edge`: more of the same word or number."""
    if edge.isdigit():
        return r"(?<!\w)(?<!\d[.,])", r"(?!\w)(?![.,]\d)"
    return (r"(?<!\w)", r"(?!\w)") if edge.isalnum() else ("", "")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().replace("’", "'")


def search_with_limit(pattern: str, answer: str) -> str | None:
    """None when the pattern is found in the answer, else the reason.

    A pattern with at most one place to backtrack runs here; any other runs in a process of its own that is ended
    after two seconds, since a nested repetition can take longer than the age of the universe.
    """
    text = answer[:REGEX_CHARS]
    if sum(pattern.count(sign) for sign in "*+?{|") <= 1:
        found = re.search(pattern, text) is not None
    else:
        outcome = _search_apart(pattern, text)
        if outcome is None:
            return f"the regex {pattern!r} took longer than {REGEX_SECONDS:g} s on this answer"
        found = outcome
    return None if found else f"does not match the regex {pattern!r}"


def _search_apart(pattern: str, text: str) -> bool | None:
    """`re.search` in a bare Python process; None when it runs out of time."""
    program = "import json, re, sys; p, t = json.load(sys.stdin); sys.exit(0 if re.search(p, t) else 3)"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            input=json.dumps([pattern, text]),
            text=True,
            timeout=REGEX_SECONDS,
            check=False,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (0, 3):
        raise EvaluationError("SUITE_INVALID", f"The regex {pattern!r} could not be tried: {done.stderr.strip()[-200:]}")
    return done.returncode == 0


# --- built-in judges ------------------------------------------------------------------------------


def list_of(answer: str, argument: str) -> bool | str:
    """Exactly N distinct items, separated by commas, "and" / "et" / "or" / "ou", or lines; a lead-in with a colon is left out."""
    items = list_items(answer)
    wanted = int(argument)
    if len(items) != wanted:
        return f"has {len(items)} list items instead of {wanted}"
    if len(set(items)) != len(items):
        return "repeats a list item"
    return True


def list_items(answer: str) -> list[str]:
    """The items of a list in an answer, folded for comparison."""
    body = INTRODUCTION.sub("", answer.strip(), count=1)
    lines = "\n".join(BULLET.sub("", line) for line in body.splitlines())
    parts = (part.strip(FINAL_PUNCTUATION) for part in ITEM_SEPARATOR.split(lines))
    return [_folded(part) for part in parts if part]


def one_word(answer: str) -> bool | str:
    """A single word; hyphens and apostrophes inside belong to it, final punctuation is allowed."""
    return re.fullmatch(r"\w+(?:[-'’]\w+)*", answer.strip(FINAL_PUNCTUATION)) is not None or "is not one word"


def no_loop(answer: str) -> bool | str:
    """No sequence of four words stands more than twice in the answer."""
    spoken = words(answer)
    grams = Counter(tuple(spoken[i : i + 4]) for i in range(len(spoken) - 3))
    repeated = [(gram, count) for gram, count in grams.most_common(1) if count > 2]
    return f"repeats {' '.join(repeated[0][0])!r} {repeated[0][1]} times" if repeated else True


def max_words(answer: str, argument: str) -> bool | str:
    """At most N words."""
    count = len(words(answer))
    return count <= int(argument) or f"has {count} words, more than {argument}"


BUILT_IN: dict[str, Judge] = {"list_of": list_of, "one_word": one_word, "no_loop": no_loop, "max_words": max_words}


# --- judges of the user ---------------------------------------------------------------------------


def load_judges(path: Path | str) -> dict[str, Judge]:
    """The public functions of a Python file, by name. This runs the file: only for one its user named explicitly."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location("ftf_judges", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise EvaluationError("JUDGES_INVALID", f"{path} is not a Python file.", remedy="Name a .py file with judge functions.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise EvaluationError(
            "JUDGES_INVALID", f"{path.name} failed while it was read: {type(error).__name__}: {error}.", where=str(path)
        ) from error
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == "ftf_judges" and not name.startswith("_")
    }
    if not found:
        raise EvaluationError("JUDGES_INVALID", f"{path.name} defines no function.", remedy="Write `def name(answer): return True`.")
    return found
