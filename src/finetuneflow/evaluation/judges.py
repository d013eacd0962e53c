"""What a suite can ask of an answer: words in it, a pattern, or a judge function by name.

A judge takes the answer (and, if it has a second parameter, the text after the colon of `name:argument`) and
returns True, or False, or a sentence that says what is wrong. Loads no torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import select
import subprocess
import sys
import threading
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

    The search runs in a helper process that is ended after two seconds: a nested repetition can take longer than
    the age of the universe, and nothing inside this process could stop it.
    """
    with _HELPER_LOCK:
        found = _HELPER.search(pattern, answer[:REGEX_CHARS])
    if found is None:
        return f"the regex {pattern!r} took longer than {REGEX_SECONDS:g} s on this answer"
    return None if found else f"does not match the regex {pattern!r}"


class _RegexHelper:
    """A bare Python process that answers searches, line by line; started when first needed, again after a time-out.

    It ends by itself when this process does (its input closes).
    """

    PROGRAM = (
        "import json, re, sys\n"
        "for line in sys.stdin:\n"
        "    pattern, text = json.loads(line)\n"
        "    print(int(re.search(pattern, text) is not None), flush=True)\n"
    )

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def search(self, pattern: str, text: str) -> bool | None:
        """`re.search`; None when it runs out of time."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([pattern, text]) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], REGEX_SECONDS)[0]:
            process.kill()
            process.wait()
            return None
        return process.stdout.readline().strip() == "1"

    def _started(self) -> subprocess.Popen[str]:
        # After a fork the pipes would be shared with the parent: each process has its own helper.
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            command = [sys.executable, "-I", "-S", "-c", self.PROGRAM]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._owner = os.getpid()
        return self._process


_HELPER = _RegexHelper()
_HELPER_LOCK = threading.Lock()


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
    found: dict[str, Judge] = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == "ftf_judges" and not name.startswith("_")
    }
    if not found:
        raise EvaluationError(
            "JUDGES_INVALID", f"{path.name} defines no function.", remedy="Write `def name(answer): return True`."
        )
    return found
