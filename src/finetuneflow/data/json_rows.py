"""JSON rows out of a text stream: one per line, a huge array, or values one after the other.

Place in the flow: `streams` -> **json_rows** -> `sources.read_rows`. Stricter than `json`: duplicate keys, NaN, numbers
no float can hold, lone surrogates, NUL and deep nesting are faults of the row. Memory stays at one block plus one row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from finetuneflow.data.streams import Limits, is_clean

BLOCK_CHARS = 1024 * 1024
BLANK = re.compile(r"[ \t\r\n\ufeff]*")
FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\\n]|\\.){0,200})"\s*:')
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used. `column` counts from 1 within the row's line."""

    code: str
    found: str
    hint: str
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """One value of the stream, or the fault in its place. `line` counts from 1."""

    line: int
    value: Any = None
    fault: Fault | None = None


class StrictJson:
    """A JSON decoder that notices what `json` lets pass. `decode` gives the value, where it ended and the fault, if any."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._fault: Fault | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._float, parse_int=self._int, parse_constant=self._constant
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, Fault | None]:
        """Raises `json.JSONDecodeError` and `RecursionError` for what is no JSON at all."""
        self._fault = None
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._fault or self._text_fault(text, start, end, value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._fault = Fault(
                "ROW_DUPLICATE_KEY",
                f"the key {visible(twice, 40)!r} appears twice in one object",
                "Keep one of the two; which one is meant cannot be guessed.",
            )
        return result

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._fault = bad_number(digits)
        return number

    def _int(self, digits: str) -> int:
        if len(digits) > 308:
            self._fault = bad_number(digits)
            return 0
        return int(digits)

    def _constant(self, name: str) -> float:
        self._fault = bad_number(name)
        return 0.0

    def _text_fault(self, text: str, start: int, end: int, value: Any) -> Fault | None:
        raw = text if start == 0 and end == len(text) else text[start:end]
        if not is_clean(raw):
            return invalid_text(raw)
        if raw.count("{") + raw.count("[") > self._limits.depth and depth_exceeds(value, self._limits.depth):
            return too_deep(self._limits.depth)
        if "\\u" not in raw:
            return None
        if SURROGATE_ESCAPE.search(raw) and not all(is_clean(part) for part in strings_in(value)):
            return Fault(
                "ROW_LONE_SURROGATE",
                "half of a surrogate pair (\\ud800-\\udfff) stands alone",
                "Write the character itself, or both halves.",
            )
        if "\\u0000" in raw and any("\0" in part for part in strings_in(value)):
            return nul_fault()
        return None


# --- faults ------------------------------------------------------------------------------------


def bad_number(digits: str) -> Fault:
    return Fault(
        "ROW_BAD_NUMBER",
        f"the number {visible(digits, 24)}",
        "JSON has no NaN and no infinity, and numbers must fit a 64-bit float; use null or text.",
    )


def too_deep(depth: int) -> Fault:
    return Fault("ROW_TOO_DEEP", f"more than {depth} nested levels", "No training data nests like this; flatten the row.")


def too_long(limit_chars: int) -> Fault:
    return Fault(
        "ROW_TOO_LONG",
        f"more than {limit_chars:,} characters in one row",
        "Split the row; if line ends are missing, write one row per line.",
    )


def nul_fault() -> Fault:
    return Fault("ROW_NUL_CHARACTER", "a NUL character (U+0000)", "Remove it; text does not contain NUL.")


def invalid_text(raw: str) -> Fault:
    """Bytes that are not valid in the file's encoding (marked by lone surrogates, see `streams`)."""
    found = SURROGATE.search(raw)
    position = found.start() if found else 0
    shown = visible(raw[max(0, position - 20) : position + 20], 80)
    return Fault(
        "ROW_INVALID_ENCODING",
        f"bytes that are not valid text: …{shown}…",
        "Convert the file to UTF-8 (for example: iconv -f cp1252 -t utf-8).",
        position + 1,
    )


def json_fault(error: json.JSONDecodeError, start: int = 0) -> Fault:
    """The decoder's complaint with its column and what stands there. `start` is where the row begins in `error.doc`."""
    line_start = max(error.doc.rfind("\n", 0, error.pos) + 1, start)
    column = error.pos - line_start + 1
    excerpt = visible(error.doc[max(start, error.pos - 30) : error.pos + 30], 90)
    return Fault("ROW_BAD_JSON", f"{error.msg} at column {column}: …{excerpt}…", _json_hint(error), column)


def _json_hint(error: json.JSONDecodeError) -> str:
    here = error.doc[error.pos : error.pos + 1]
    before = error.doc[max(0, error.pos - 200) : error.pos].rstrip()[-1:]
    if here == "'":
        return "JSON strings use double quotes; this looks like printed Python. Write rows with json.dumps."
    if (before == "," and here in ("}", "]", '"')) or (
        error.msg.startswith(("Expecting property name", "Illegal trailing comma"))
    ):
        return "Remove the comma before the closing bracket, and quote every key."
    if error.msg.startswith("Invalid control character"):
        return "A line break or control character inside a string must be written as \\n or \\u00XX."
    if error.msg == "Extra data":
        return "One JSON value per line; remove what follows it (a comma after each row, or a second object)."
    return "Write one complete JSON object per line, or one array of objects."


def visible(text: str, limit: int = 80) -> str:
    """Text from outside made safe to show: control, ANSI and bidirectional characters escaped, cut at `limit` characters."""
    cut = text[: limit + 1]
    shown = cut if cut.isascii() and cut.isprintable() else "".join(_escaped(char) for char in cut)
    return shown if len(shown) <= limit else shown[: max(0, limit - 1)] + "…"


def _escaped(char: str) -> str:
    if char.isprintable() and not "\ud800" <= char <= "\udfff":
        return char
    return char.encode("unicode_escape").decode("ascii")


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included, without recursion."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def depth_exceeds(value: Any, limit: int) -> bool:
    """True when a JSON value nests deeper than `limit`, without recursion."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict | list):
            if depth > limit:
                return True
            stack.extend((child, depth + 1) for child in (item.values() if isinstance(item, dict) else item))
    return False


# --- one value per line ------------------------------------------------------------------------


def numbered_lines(stream: TextIO, limit_chars: int) -> Iterator[tuple[int, str | None]]:
    """Lines with their number from 1; None stands for a line longer than the limit, which is skipped over."""
    number = 0
    while line := stream.readline(limit_chars + 1):
        number += 1
        if len(line) <= limit_chars:
            yield number, line
            continue
        while not line.endswith("\n") and (line := stream.readline(limit_chars)):
            pass
        yield number, None


def values_by_line(stream: TextIO, limits: Limits) -> Iterator[Parsed]:
    """JSON Lines: blank lines are skipped, every other line is one value or one fault."""
    parser = StrictJson(limits)
    for number, line in numbered_lines(stream, limits.row_chars):
        if line is None:
            yield Parsed(number, fault=too_long(limits.row_chars))
        elif text := line.strip(" \t\r\n\ufeff"):
            yield _parse_line(parser, text, number, limits)


def _parse_line(parser: StrictJson, text: str, number: int, limits: Limits) -> Parsed:
    try:
        value, end, fault = parser.decode(text)
        if end != len(text):
            end = BLANK.match(text, end).end()  # type: ignore[union-attr]
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return Parsed(number, fault=json_fault(error) if is_clean(text) else invalid_text(text))
    except RecursionError:
        return Parsed(number, fault=too_deep(limits.depth))
    return Parsed(number, value, fault)


# --- a huge array, or values one after the other -------------------------------------------------


class Window:
    """A sliding piece of the text: `text[position:]` is unread, `line` is the line of `position`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.text = ""
        self.position = 0
        self.line = 1
        self.eof = False

    @property
    def unread(self) -> int:
        return len(self.text) - self.position

    def fill(self, chars: int = BLOCK_CHARS) -> None:
        """Drop what was read and append up to `chars` more."""
        more = self._stream.read(chars)
        self.eof = not more
        self.text = self.text[self.position :] + more
        self.position = 0

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.position, to)
        self.position = to

    def next_char(self) -> str:
        """The next character that is not blank, not consumed; empty at the end."""
        while True:
            self.advance(BLANK.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if self.eof:
                return ""
            self.fill()


class ArrayReader:
    """Reads the values of one array, or values one after the other, keeping the good ones around a bad one."""

    def __init__(self, stream: TextIO, limits: Limits) -> None:
        self._window = Window(stream)
        self._limits = limits
        self._parser = StrictJson(limits)

    def values(self) -> Iterator[Parsed]:
        """The values of a top-level array."""
        window = self._window
        if window.next_char() != "[":
            raise ValueError("not an array")
        window.advance(window.position + 1)
        comma_line: int | None = None
        while (char := window.next_char()) not in ("]", ""):
            if char == ",":
                yield Parsed(window.line, fault=stray_comma())
                window.advance(window.position + 1)
                continue
            yield self._value()
            comma_line = window.line if self._take_comma() else None
        if char == "":
            yield Parsed(
                window.line,
                fault=Fault(
                    "ROW_TRUNCATED", "the file ends before the closing ]", "The file was cut; write or download it again."
                ),
            )
            return
        if comma_line is not None:
            yield Parsed(comma_line, fault=stray_comma())
        window.advance(window.position + 1)
        if window.next_char():
            yield Parsed(
                window.line,
                fault=Fault(
                    "ROW_BAD_JSON",
                    f"text after the closing ]: {self._excerpt()}",
                    "Put all rows inside one array, or write one per line.",
                ),
            )

    def documents(self) -> Iterator[Parsed]:
        """Values that follow each other with blanks between, each over as many lines as it likes."""
        while self._window.next_char():
            yield self._value()

    def _take_comma(self) -> bool:
        if self._window.next_char() != ",":
            return False
        self._window.advance(self._window.position + 1)
        return True

    def _excerpt(self) -> str:
        return visible(self._window.text[self._window.position : self._window.position + 40], 60)

    def _value(self) -> Parsed:
        window, line = self._window, self._window.line
        while True:
            try:
                value, end, fault = self._parser.decode(window.text, window.position)
            except json.JSONDecodeError as error:
                if not window.eof and self._may_be_cut(error):
                    if window.unread <= self._limits.row_chars:
                        window.fill(max(BLOCK_CHARS, window.unread))
                        continue
                    fault = too_long(self._limits.row_chars)
                else:
                    fault = json_fault(error, window.position)
                return self._skip_bad_value(line, fault)
            except RecursionError:
                return self._skip_bad_value(line, too_deep(self._limits.depth))
            if end == len(window.text) and not window.eof and not isinstance(value, dict | list | str):
                window.fill()  # a number may go on in the next block
                continue
            if end - window.position > self._limits.row_chars:
                fault = too_long(self._limits.row_chars)
            window.advance(end)
            return Parsed(line, value, fault)

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """True when more text could make the value whole: the decoder stopped at the end of the window."""
        longest_token = 16  # a \\uXXXX pair, `-Infinity`, the decoder's look-ahead
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window.text) - longest_token

    def _skip_bad_value(self, line: int, fault: Fault) -> Parsed:
        """Move to the next object that starts with the same key as this one, so that only the bad row is lost."""
        window = self._window
        first_key = FIRST_KEY.match(window.text, window.position)
        anchor = re.compile(r'\{\s*"' + re.escape(first_key[1]) + r'"\s*:') if first_key else re.compile(r"(?<=,)\s*[{\[\"]")
        window.advance(window.position + 1)
        while (found := anchor.search(window.text, window.position)) is None:
            if window.eof:
                # Leave a closing bracket to be found, so that the array still ends in order.
                closing = window.text.rstrip().endswith("]")
                window.advance(len(window.text.rstrip()) - 1 if closing and window.unread > 1 else len(window.text))
                break
            overlap = 1024
            window.advance(max(window.position, len(window.text) - overlap))
            window.fill()
        else:
            window.advance(found.start())
        return Parsed(line, fault=fault)


def stray_comma() -> Fault:
    return Fault("ROW_BAD_JSON", "a comma with no row after it", "Remove the trailing comma.")
