"""Where each answer stands in a rendered conversation, found by ourselves for any template.

Place in the flow: used by `templates.Template`; knows no tokenizer.

Three renderings settle an assistant's turn i; invisible marks close every turn's content in all of them:
- F, the whole conversation;
- G, the messages before i with the generation prompt: what the model is given at inference. The answer starts in F
  where G ends (compared from the last mark before the answer on). That is the only start that is right for generation;
- T, the messages up to and with i: how the turn ends when it is the last one. The answer ends in F after the turn-end.
The marked F without its marks must equal the rendering of the bare messages. If it does not, or a turn cannot be
found, that is said: nothing is guessed.

Conversations of one shape (roles, in order) render alike but for their contents, so a `Skeleton` is worked out once per
shape, filled per row, and held against the true rendering of that row; a row it does not fit goes the long way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetuneflow.data.encoding import MARK, MAX_TURNS, mark
from finetuneflow.data.sandbox import TemplateRefusal
from finetuneflow.errors import DataError

Turn = dict[str, Any]  # a message as templates expect it
Render = Callable[[Sequence[Turn], bool], str]  # messages, add_generation_prompt -> text


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn in the text, in characters: what the model writes, turn-end included.

    `mark` is where its content ends. `ended` is False when the template closes the turn with nothing the model could learn.
    `as_prompted` is False when the generation prompt of inference differs from what stands before the answer.
    """

    message: int
    start: int
    mark: int
    end: int
    ended: bool
    as_prompted: bool


@dataclass(frozen=True, slots=True)
class Located:
    """A rendered conversation with its answers.

    `turns`: how many messages were rendered. `unlocated`: assistant turns that were not found (never in the loss).
    """

    text: str
    answers: tuple[Answer, ...]
    turns: int
    unlocated: tuple[int, ...] = ()


class SpansNotFound(DataError):
    """The template's output cannot be traced back to the messages."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What a template writes around a plain answer, found by probing.

    `prompt_end`: the assistant's header as far as it never changes. `header`: a header that the template writes before an
    answer but leaves out of the generation prompt. `turn_end`: the text that ends a turn ("" if there is none).
    `lead`: what the model writes itself before a plain answer's first character (a space, mostly nothing).
    `exact`: the generation prompt stands before the answer character for character.
    """

    prompt_end: str
    header: str
    lead: str
    turn_end: str
    generation_prompt: bool
    exact: bool


def probe(render: Render, is_token: Callable[[str], str | None]) -> Anatomy:
    """Learn a template's anatomy from one question and answer. Raises SpansNotFound with the reason.

    `is_token` gives the control token that a text begins with, or None.
    """
    question = {"role": "user", "content": f"Q{mark(0)}"}
    answer = {"role": "assistant", "content": f"{mark(-2)}A{mark(1)}"}
    full = render([question, answer], False)
    if full.count(mark(0)) != 1 or full.count(mark(1)) != 1 or full.count(mark(-2)) != 1:
        raise _not_found("it does not write the question and the answer exactly once each")
    before = full[full.index(mark(0)) + 1 : full.index(mark(-2))]
    bare = _after(render([question], False), mark(0))
    prompted = _after(render([question], True), mark(0))
    if prompted is None or bare is None:
        raise _not_found("it loses the question when there is no answer yet")
    has_prompt = prompted != bare
    exact = before.startswith(prompted)
    matched = _match(prompted, before)
    if matched is None and has_prompt:
        matched = _common(prompted, before)
        if not prompted[_common(prompted[:matched], bare) : matched].strip():
            raise _not_found("its generation prompt is not what it writes before an answer")
    elif matched is None:
        raise _not_found("what it writes before an answer is not what it writes when the answer is missing")
    prompted = before[:matched]
    gap = before[len(prompted) :]
    reasoned = {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}
    header = "" if has_prompt or not gap.strip() else gap
    thinking = _after(render([question, reasoned], False), mark(0)) or ""
    fixed = prompted[: _common(prompted, thinking)]
    return Anatomy(
        prompt_end=fixed[_common(fixed, bare) :] if has_prompt else "",
        header=header,
        lead="" if header else gap,
        turn_end=_turn_end(full[full.index(mark(1)) + 1 :], is_token),
        generation_prompt=has_prompt,
        exact=exact,
    )


def _turn_end(tail: str, is_token: Callable[[str], str | None]) -> str:
    """The sign that ends a turn, from what follows the last answer: a control token, else the first line of text."""
    text = tail.strip()
    return is_token(text) or text.split("\n", 1)[0].rstrip()


def _not_found(reason: str) -> SpansNotFound:
    return SpansNotFound(
        "TEMPLATE_NO_SPANS",
        f"The answers cannot be found in what this chat template writes: {reason}.",
        remedy="Use a built-in template (template: chatml, llama3, mistral, gemma, plain, …).",
    )


def _common(left: str, right: str) -> int:
    """Length of the common beginning."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _match(prompt: str, text: str) -> int | None:
    """Where `prompt` ends in `text`, which must begin with it; runs of white space may differ in length.

    Templates laid out for reading write other indents before a generation prompt than before an answer.
    """
    if text.startswith(prompt):
        return len(prompt)
    position = 0
    for word in prompt.split():
        while position < len(text) and text[position].isspace():
            position += 1
        if not text.startswith(word, position):
            return None
        position += len(word)
    closing = prompt[len(prompt.rstrip()) :]
    return position + _common(closing, text[position:])


def _after(text: str, sign: str) -> str | None:
    return text[text.index(sign) + 1 :] if text.count(sign) == 1 else None


def locate(render: Render, anatomy: Anatomy, messages: Sequence[Turn]) -> Located:
    """Find every answer of one conversation by marked renderings. Raises SpansNotFound or the template's own refusal."""
    if len(messages) > MAX_TURNS:
        raise _not_found(f"the conversation has more than {MAX_TURNS:,} turns")
    bare = render(messages, False)
    for roles in (None, ("system", "user", "assistant"), ("user", "assistant"), ("assistant",)):
        marked = [
            _close(turn, number) if roles is None or turn["role"] in roles else turn for number, turn in enumerate(messages)
        ]
        try:
            full = render(marked, False)
        except TemplateRefusal:
            continue
        if MARK.sub("", full) == bare:
            return _unmark(_locate_marked(render, anatomy, marked, full), full)
    raise _not_found("its output changes in other places when one content changes")


def _close(turn: Turn, number: int) -> Turn:
    """The turn with its mark after the last visible character of its content, or of its tool calls' names."""
    closed = dict(turn)
    content = turn["content"]
    core = content.rstrip()
    if core:
        closed["content"] = core + mark(number) + content[len(core) :]
    if calls := turn.get("tool_calls"):
        last = dict(calls[-1])
        last["function"] = {**last["function"], "name": last["function"]["name"] + mark(number)}
        if core:
            closed["content"] = content
        closed["tool_calls"] = [*calls[:-1], last]
    return closed


def _locate_marked(render: Render, anatomy: Anatomy, marked: Sequence[Turn], full: str) -> Located:
    """Answers in marked characters."""
    _check_kept(marked, full)
    answers: list[Answer] = []
    unlocated: list[int] = []
    for number, turn in enumerate(marked):
        if turn["role"] != "assistant":
            continue
        answer = _one_answer(render, anatomy, marked, full, number)
        if answer is None:
            unlocated.append(number)
        else:
            answers.append(answer)
    return Located(full, tuple(answers), len(marked), tuple(unlocated))


def _check_kept(marked: Sequence[Turn], full: str) -> None:
    """Every turn that has a mark must be in the text once: a template that drops or repeats turns is not trained on."""
    for number, turn in enumerate(marked):
        if not _is_marked(turn, number):
            continue
        count = full.count(mark(number))
        if count != 1:
            what = "leaves out" if count == 0 else "repeats"
            part = "tool calls" if turn.get("tool_calls") else "a turn"
            raise _not_found(f"it {what} {part} of role {turn['role']!r}")


def _is_marked(turn: Turn, number: int) -> bool:
    if calls := turn.get("tool_calls"):
        return bool(calls[-1]["function"]["name"].endswith(mark(number)))
    return mark(number) in turn["content"]


def _one_answer(render: Render, anatomy: Anatomy, marked: Sequence[Turn], full: str, number: int) -> Answer | None:
    if mark(number) not in full:
        return None  # an empty answer: there is nothing to learn
    start, as_prompted = _start(render, anatomy, marked, full, number)
    if start is None:
        return None
    closed = full.index(mark(number)) + 1
    tail = full[closed:]
    last = _after(render(marked[: number + 1], False), mark(number)) or ""
    length = last.rindex(anatomy.turn_end) + len(anatomy.turn_end) if anatomy.turn_end and anatomy.turn_end in last else 0
    ended = length > 0 and tail.startswith(last[:length])
    if not ended:
        length = _common(last.rstrip(), tail) if marked[number].get("tool_calls") else 0
    return Answer(number, start, closed, closed + length, ended, as_prompted)


def _start(render: Render, anatomy: Anatomy, marked: Sequence[Turn], full: str, number: int) -> tuple[int | None, bool]:
    """Where the answer starts, and whether it starts exactly where the generation prompt ends."""
    try:
        prompt = render(marked[:number], True)
    except DataError:
        return None, False
    anchor = next((n for n in range(number - 1, -1, -1) if mark(n) in full and mark(n) in prompt), None)
    begin = 0 if anchor is None else full.index(mark(anchor)) + 1
    prompted = prompt if anchor is None else prompt[prompt.index(mark(anchor)) + 1 :]
    tail = full[begin : full.index(mark(number))]
    matched = _match(prompted, tail)
    if matched is not None:
        header = len(anatomy.header) if tail.startswith(anatomy.header, matched) else 0
        return begin + matched + header, tail.startswith(prompted)
    shared = _common(prompted, tail)
    if anatomy.generation_prompt and anatomy.prompt_end.strip() and anatomy.prompt_end in tail[:shared]:
        return begin + shared, False
    if anchor is not None and anchor == number - 1 and marked[anchor]["role"] == "assistant":
        return begin, False  # the template joins two answers in a row into one turn
    return None, False


def _unmark(located: Located, full: str) -> Located:
    """Positions in marked characters -> positions in the text."""
    marks = [found.start() for found in MARK.finditer(full)]

    def real(position: int) -> int:
        return position - sum(1 for found in marks if found < position)

    answers = tuple(replace(a, start=real(a.start), mark=real(a.mark), end=real(a.end)) for a in located.answers)
    return Located(MARK.sub("", full), answers, located.turns, located.unlocated)


# One shape of conversation, worked out once ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a message's content goes, and which of its outer spaces the template removes."""

    message: int
    strip_left: bool
    strip_right: bool

    def fill(self, content: str) -> str:
        if self.strip_left:
            content = content.lstrip()
        return content.rstrip() if self.strip_right else content


@dataclass(frozen=True, slots=True)
class _Point:
    """A position as (slot after which it lies, characters after that slot's end); slot -1 is the beginning."""

    slot: int
    offset: int


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A shape of conversation: fixed texts with slots between them, and the answers as points."""

    fixed: tuple[str, ...]
    slots: tuple[_Slot, ...]
    points: tuple[tuple[Answer, _Point, _Point, _Point], ...]
    unlocated: tuple[int, ...]

    def fill(self, contents: Sequence[str]) -> Located:
        """The text for these contents, with the answers' positions. Nothing is checked here: `locate_fast` does."""
        pieces = [self.fixed[0]]
        ends = [0]
        length = len(self.fixed[0])
        for slot, after in zip(self.slots, self.fixed[1:], strict=True):
            content = slot.fill(contents[slot.message])
            length += len(content)
            ends.append(length)
            pieces += (content, after)
            length += len(after)

        def at(point: _Point) -> int:
            return ends[point.slot + 1] + point.offset

        answers = tuple(replace(a, start=at(start), mark=at(close), end=at(end)) for a, start, close, end in self.points)
        return Located("".join(pieces), answers, len(contents), self.unlocated)


_PAD = "\x0b"  # a white-space character that no template writes itself


def skeleton(render: Render, anatomy: Anatomy, roles: Sequence[tuple[str, bool]]) -> Skeleton | None:
    """The skeleton of a shape, (role, is empty) per message; None if this template's shapes are not that simple."""
    marked = [_padded(role, empty, number) for number, (role, empty) in enumerate(roles)]
    full = render(marked, False)
    located = _locate_marked(render, anatomy, marked, full)
    numbers = [number for number, (_, empty) in enumerate(roles) if not empty]
    if any(full.count(mark(-number - 1)) != 1 for number in numbers):
        return None
    numbers.sort(key=lambda number: full.index(mark(number)))
    return _cut_into_slots(full, numbers, located)


def _padded(role: str, empty: bool, number: int) -> Turn:
    content = "" if empty else f"{_PAD}{mark(-number - 1)}x{mark(number)}{_PAD}"
    return {"role": role, "content": content}


def _cut_into_slots(full: str, numbers: Sequence[int], located: Located) -> Skeleton | None:
    fixed: list[str] = []
    slots: list[_Slot] = []
    ends: list[int] = [0]
    position = 0
    for number in numbers:
        begin, end = full.index(mark(-number - 1)), full.index(mark(number)) + 1
        slot = _Slot(number, full[begin - 1 : begin] != _PAD, full[end : end + 1] != _PAD)
        begin, end = begin - (not slot.strip_left), end + (not slot.strip_right)
        if begin < position:
            return None
        fixed.append(full[position:begin])
        slots.append(slot)
        ends.append(end)
        position = end
    fixed.append(full[position:])
    if any(_PAD in text or MARK.search(text) for text in fixed):
        return None
    points = tuple((a, _point(a.start, ends), _point(a.mark, ends), _point(a.end, ends)) for a in located.answers)
    return Skeleton(tuple(fixed), tuple(slots), points, located.unlocated)


def _point(position: int, ends: Sequence[int]) -> _Point:
    """The slot that ends last at or before a position (a point within a slot's last space counts from its end)."""
    slot = max(number for number, end in enumerate(ends) if end <= position + 1)
    return _Point(slot - 1, max(0, position - ends[slot]))


def shape_of(messages: Sequence[Turn]) -> tuple[tuple[str, bool], ...] | None:
    """The key of a conversation's skeleton; None when more than roles and contents matter (tool calls, names)."""
    if any(len(turn) != 2 for turn in messages):
        return None
    return tuple((turn["role"], not turn["content"].strip()) for turn in messages)


def tools_key(tools: Sequence[dict[str, Any]]) -> str:
    return json.dumps(tools, sort_keys=True, ensure_ascii=False) if tools else ""
