"""Text of others inside our Markdown: a model's output or a file name must be shown, never obeyed."""

from __future__ import annotations

import unicodedata

CELL_LIMIT = 300  # characters of a sample shown in a table cell
MARKUP = str.maketrans(
    {"|": "\\|", "<": "&lt;", ">": "&gt;", "&": "&amp;", "`": "\\`", "*": "\\*", "_": "\\_", "[": "\\[", "]": "\\]", "\\": "\\\\"}
)


def visible(text: str) -> str:
    """The text with control, escape and direction characters spelled out; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}" for c in text)


def cell(text: str, limit: int = CELL_LIMIT) -> str:
    """One table cell: on one line, markup escaped, cut with the number of characters left out."""
    text = visible(text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    rest = len(text) - limit
    shown = (text if rest <= 0 else text[:limit]).translate(MARKUP).replace("\n", "<br>").replace("\t", " ")
    return shown if rest <= 0 else f"{shown} … ({rest} more characters)"


def inline(text: str) -> str:
    """A name or path within a sentence or list item: one line, markup escaped."""
    return " ".join(visible(text).translate(MARKUP).split())


def figure(value: object, digits: int = 4) -> str:
    """A measured number for people, or what to say when there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def rate(value: float) -> str:
    """A learning rate as people write it: 0.0002 -> 2e-4."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: object) -> str:
    """Seconds as `1 h 02 min 03 s`, without leading zero units."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes:02d} min " if hours else f"{minutes} min ") + f"{rest:02d} s"


def size(num_bytes: int) -> str:
    """Bytes with a decimal unit."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
