"""The bundled starter model: a tiny bilingual base model, its tokenizer and its acceptance suite.

Small enough to fine-tune on a laptop in about a minute, it makes the whole product testable
offline. See `CARD.md` in this folder for what it is and what it is not.
"""

from __future__ import annotations

from pathlib import Path


def starter_path() -> Path:
    """The folder that holds the model, its tokenizer and the two prompt suites."""
    return Path(__file__).resolve().parent
