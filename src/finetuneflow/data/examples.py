"""Shape: from a row of any common dataset to one canonical `Example`.

Place in the flow: `sources.read_rows` -> **examples.to_examples** -> `quality.inspect`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["chat", "text", "preference", "unpaired"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from. `row` counts rows from 0, `line` counts lines from 1 (text files only)."""

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line is not None else f"{self.file}[{self.row}]"


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that cannot be used, as a value: bad rows never stop good ones."""

    place: Place
    code: str
    found: str
    hint: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant makes. `arguments` is a JSON object (already parsed)."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0.0 keeps an assistant turn out of the loss."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """What everything after this stage works on, whatever the file looked like.

    - `chat`: `messages` is the whole conversation.
    - `text`: `text` is the document (continued pre-training).
    - `preference`: `messages` is the shared prompt, `chosen` / `rejected` the two endings.
    - `unpaired` (KTO): `messages` is prompt + answer, `label` says whether the answer is good.

    `group` ties examples that must stay on one side of a split (same document or tree);
    `shape` names the format it was read from; `notes` what was recognised and repaired.
    """

    kind: Kind
    place: Place
    shape: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    notes: tuple[str, ...] = field(default=())
