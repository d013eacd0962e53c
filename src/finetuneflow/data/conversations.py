"""Turns: from any spelling of a chat message to `Message`, and the rules that make a conversation trainable.

Place in the flow: `shapes` reads a row's columns and calls this for everything that has turns. Every repair leaves a
note (`examples.NOTES`); what cannot be repaired safely raises `RowFault`, which becomes a `Problem`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import replace
from itertools import groupby
from typing import Any

from finetuneflow.data.examples import Message, Role, ToolCall, visible

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
CALL_ROLES = frozenset({"function_call", "tool_call"})
# Spellings seen in the wild that are too vague to accept unasked, with what is most likely meant.
LIKELY_ROLES = {
    "bot": "assistant", "ai": "assistant", "chatbot": "assistant", "agent": "assistant", "answer": "assistant", "response": "assistant",
    "customer": "user", "person": "user", "question": "user", "instruction": "user", "prompt": "user", "client": "user",
    "context": "system", "sys": "system", "tool_result": "tool", "function_result": "tool",
}  # fmt: skip
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message")
CALL_IN_TEXT = re.compile(r"<tool_call|<function|functioncall|\[TOOL_CALLS\]|<\|python_tag\|>", re.IGNORECASE)
PART_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
MEDIA_TYPES = ("image", "video", "audio", "file", "media")


class RowFault(Exception):
    """Why a row is rejected: becomes a `Problem` at its place."""

    def __init__(self, code: str, found: str, hint: str) -> None:
        super().__init__(found)
        self.code = code
        self.found = found
        self.hint = hint


def read_messages(items: Any, notes: list[str]) -> tuple[Message, ...]:
    """Messages as written, before the rules of `trainable`."""
    if not isinstance(items, list) or not items:
        raise RowFault(
            "ROW_NO_MESSAGES",
            f"the list of turns is {'empty' if items == [] else visible(repr(items), 60)}",
            "Give a list with a user turn and an assistant turn.",
        )
    if all(isinstance(item, str) for item in items):
        raise RowFault(
            "ROW_WRONG_TYPE", "turns without roles (bare strings)", 'Write each turn as {"role": "user", "content": …}.'
        )
    return tuple(_read_message(item, index, notes) for index, item in enumerate(items))


def _read_message(item: Any, index: int, notes: list[str]) -> Message:
    if not isinstance(item, dict):
        raise RowFault(
            "ROW_WRONG_TYPE", f"turn {index} is {type_name(item)}", 'Write each turn as {"role": "user", "content": …}.'
        )
    spelled = _first_value(item, ROLE_KEYS)
    role = read_role(spelled, index)
    content = _first_value(item, CONTENT_KEYS)
    calls: tuple[ToolCall, ...] = ()
    if isinstance(spelled, str) and spelled.strip().lower() in CALL_ROLES:
        calls, content = read_calls(content, index), None
    elif item.get("tool_calls"):
        calls = read_calls(item["tool_calls"], index)
    elif item.get("function_call"):
        calls = read_calls(item["function_call"], index)
    if calls and role != "assistant":
        raise RowFault("ROW_BAD_TOOL_CALL", f"turn {index}: a {role} turn makes a tool call", "Only assistant turns call tools.")
    return Message(
        role,
        read_text(content, f"turn {index}", notes),
        tool_calls=calls,
        name=_optional_text(item.get("name")),
        tool_call_id=_optional_text(item.get("tool_call_id")) if role == "tool" else None,
        weight=_weight(item, index) if role == "assistant" else 1.0,
    )


def _first_value(item: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _optional_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def read_role(spelled: Any, index: int) -> Role:
    """The canonical role, or a fault that names the nearest one."""
    if not isinstance(spelled, str):
        raise RowFault(
            "ROW_UNKNOWN_ROLE",
            f"turn {index} has no role",
            "Each turn needs `role` (or `from`): system, user, assistant or tool.",
        )
    role = ROLES.get(spelled) or ROLES.get(spelled.strip().lower())
    if role is None:
        key = spelled.strip().lower()
        close = difflib.get_close_matches(key, ROLES, n=1)
        meant = LIKELY_ROLES.get(key) or (ROLES[close[0]] if close else None)
        hint = (
            f"role `{visible(spelled, 40)}`: did you mean `{meant}`?" if meant else "Roles are system, user, assistant and tool."
        )
        raise RowFault("ROW_UNKNOWN_ROLE", f"role `{visible(spelled, 40)}` in turn {index}", hint)
    return role


def _weight(item: dict[str, Any], index: int) -> float:
    if item.get("train") is False:
        return 0.0
    value = next((item[key] for key in ("loss_weight", "weight") if item.get(key) is not None), 1.0)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowFault(
            "ROW_WRONG_TYPE",
            f"turn {index} has the weight {visible(repr(value), 40)}",
            "A weight is a number from 0 (not learned) up.",
        )
    return float(value)


def read_text(value: Any, what: str, notes: list[str]) -> str:
    """Text of a cell or turn: a string, null (empty), a number (noted), or a list of typed parts."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (bool, dict)):
        raise wrong_type(what, value)
    if isinstance(value, int | float):
        notes.append("number_as_text")
        return str(value)
    if isinstance(value, list):
        return _read_parts(value, what, notes)
    raise wrong_type(what, value)


def _read_parts(parts: list[Any], what: str, notes: list[str]) -> str:
    if len(parts) == 1 and isinstance(parts[0], str):
        notes.append("list_of_one")
        return parts[0]
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            raise wrong_type(what, parts)
        kind = str(part.get("type") or "text")
        if kind.startswith(MEDIA_TYPES) or (kind.startswith("input_") and kind not in PART_TEXT_TYPES):
            raise media_fault(kind)
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if kind not in PART_TEXT_TYPES or not isinstance(text, str):
            raise RowFault(
                "ROW_WRONG_TYPE",
                f"{what}: a content part of type {visible(kind, 30)!r} without text",
                'Parts must be {"type": "text", "text": …}.',
            )
        texts.append(text)
    return "".join(texts)


def wrong_type(what: str, value: Any) -> RowFault:
    return RowFault(
        "ROW_WRONG_TYPE",
        f"{what} is {type_name(value)}: {visible(repr(value)[:200], 60)}",
        "Make it text, or name the right column with a mapping.",
    )


def type_name(value: Any) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        type(None): "null",
        bytes: "binary data",
    }
    return names.get(type(value), type(value).__name__)


def media_fault(kind: str) -> RowFault:
    return RowFault(
        "ROW_MEDIA",
        f"the row needs {visible(kind, 30)}",
        "Images, sound and files are not supported: only text is learned. Remove such rows or describe the picture in words.",
    )


# --- tool calls --------------------------------------------------------------------------------


def read_calls(value: Any, index: int) -> tuple[ToolCall, ...]:
    """Tool calls from a list, one object, or JSON text of either; `{function: {...}}` wrappers are opened."""
    if isinstance(value, str):
        value = _from_json(value, index)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise bad_call(index, "no call in it")
    return tuple(_read_call(call, index) for call in calls)


def _read_call(call: Any, index: int) -> ToolCall:
    if not isinstance(call, dict):
        raise bad_call(index, f"the call is {type_name(call)}")
    inner = call.get("function")
    body = inner if isinstance(inner, dict) else call
    name = body.get("name")
    if not isinstance(name, str) or not name.strip():
        raise bad_call(index, "the call has no function name")
    arguments: Any = next((body[key] for key in ("arguments", "parameters", "args") if body.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments, index) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise bad_call(index, f"the arguments are {type_name(arguments)}")
    return ToolCall(name, arguments, _optional_text(call.get("id")))


def _from_json(text: str, index: int) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_call(index, f"not JSON: {visible(text, 50)}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def bad_call(index: int, found: str) -> RowFault:
    return RowFault(
        "ROW_BAD_TOOL_CALL", f"turn {index}: {found}", 'A call is {"name": …, "arguments": {…}}; half of one is never learned.'
    )


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions from a list, one object, or JSON text of either; absent or empty gives ()."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RowFault(
                "ROW_BAD_TOOLS", f"`tools` is not JSON: {visible(value, 50)}", "Write tools as a list of JSON objects."
            ) from error
    if value is None:
        return ()
    tools = value if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("ROW_BAD_TOOLS", "`tools` is not a list of objects", "Write tools as a list of JSON objects.")
    return tuple(tools)


# --- the rules ---------------------------------------------------------------------------------


def trainable(messages: tuple[Message, ...], notes: list[str]) -> tuple[Message, ...]:
    """A conversation that starts with a prompt, alternates, and ends with an answer to learn; or a fault.

    Applying it twice changes nothing. Repairs, each noted: empty system turns and what stands before the first prompt
    are dropped, the same role twice is joined, turns after the last answer are dropped, an empty answer in the middle
    is kept out of the loss.
    """
    if _is_plain_pair(messages):
        return messages
    _require_roles(messages)
    turns = _joined(_from_first_prompt(list(messages), notes), notes)
    turns = _until_last_answer(turns, notes)
    _require_prompt(turns)
    turns = [_silenced(turn, notes) for turn in turns]
    if not any(turn.role == "assistant" and turn.weight > 0 for turn in turns):
        raise RowFault(
            "ROW_NOTHING_SUPERVISED", "every assistant turn has the weight 0", "Give at least one answer a weight above 0."
        )
    _check_tool_turns(turns, notes)
    return tuple(turns)


def _is_plain_pair(messages: tuple[Message, ...]) -> bool:
    """One prompt and one answer with text: by far the most frequent case, and nothing to repair."""
    if len(messages) != 2:
        return False
    prompt, answer = messages
    texts = prompt.content.strip() and answer.content.strip()
    return bool(texts) and prompt.role == "user" and answer.role == "assistant" and answer.weight > 0


def prompt_messages(messages: tuple[Message, ...], notes: list[str]) -> tuple[Message, ...]:
    """The shared prompt of a preference pair: like `trainable`, but it ends with what the answer replies to."""
    turns = _joined(_from_first_prompt(list(messages), notes), notes)
    _require_prompt(turns)
    turns = [_silenced(turn, notes) for turn in turns]
    if turns[-1].role not in ("user", "tool"):
        raise RowFault(
            "ROW_BAD_PREFERENCE",
            "the shared prompt ends with an assistant turn",
            "Both answers must reply to the same user turn.",
        )
    _check_tool_turns(turns, notes)
    return tuple(turns)


def is_blank_answer(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls and not message.content.strip()


def _require_roles(messages: tuple[Message, ...]) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        only = "only a system turn" if all(message.role == "system" for message in messages) else "no assistant turn"
        raise RowFault("ROW_NO_ASSISTANT", only, "Add the assistant's answer; there is nothing to learn without one.")
    if all(is_blank_answer(message) for message in answers):
        raise empty_answer("every assistant turn is empty")


def empty_answer(found: str) -> RowFault:
    return RowFault("ROW_EMPTY_ANSWER", found, "Write the answer or remove the row; an empty answer teaches silence.")


def _from_first_prompt(turns: list[Message], notes: list[str]) -> list[Message]:
    kept = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    if len(kept) < len(turns):
        notes.append("empty_system_dropped")
    first = next((i for i, turn in enumerate(kept) if turn.role == "user"), None)
    if first is None:
        raise RowFault("ROW_NO_PROMPT", "no user turn", "Add what the assistant answers to.")
    opening = [turn for turn in kept[:first] if turn.role == "system"]
    if len(opening) < first:
        notes.append("starts_with_assistant")
    if any(turn.role == "system" for turn in kept[first:]):
        notes.append("system_in_the_middle")
    return opening + kept[first:]


def _require_prompt(turns: list[Message]) -> None:
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise RowFault("ROW_NO_PROMPT", "no user turn with text before an answer", "Add what the assistant answers to.")


def _joined(turns: list[Message], notes: list[str]) -> list[Message]:
    result: list[Message] = []
    for role, group in groupby(turns, key=lambda turn: turn.role):
        run = list(group)
        if len(run) == 1 or role == "tool":
            result += run
        else:
            notes.append("same_role_twice")
            result.append(_join(run))
    return result


def _join(run: list[Message]) -> Message:
    said = [turn for turn in run if not is_blank_answer(turn)] or run
    if len({turn.weight for turn in said}) > 1:
        raise RowFault(
            "ROW_SAME_ROLE_TWICE",
            "assistant turns in a row with different weights",
            "Join them, or put the user's turn between them.",
        )
    texts = [turn.content for turn in run if turn.content.strip()]
    calls = tuple(call for turn in run for call in turn.tool_calls)
    return replace(said[0], content="\n\n".join(texts), tool_calls=calls)


def _until_last_answer(turns: list[Message], notes: list[str]) -> list[Message]:
    end = len(turns)
    while end and (turns[end - 1].role != "assistant" or is_blank_answer(turns[end - 1])):
        notes.append("empty_answer_dropped" if turns[end - 1].role == "assistant" else "ends_without_answer")
        end -= 1
    if not end:
        raise RowFault(
            "ROW_NO_ASSISTANT", "no answer after the first user turn", "Add the assistant's answer to the user's turn."
        )
    return turns[:end]


def _silenced(turn: Message, notes: list[str]) -> Message:
    if turn.role == "user" and not turn.content.strip():
        notes.append("empty_user_turn")
    if not is_blank_answer(turn):
        return turn
    notes.append("empty_answer_unsupervised")
    return replace(turn, weight=0.0)


def _check_tool_turns(turns: list[Message], notes: list[str]) -> None:
    caller: Message | None = None  # the last turn that is no tool result
    for index, turn in enumerate(turns):
        if turn.role == "tool":
            _check_result(turn, index, caller, notes)
            continue
        if turn.role == "user" and caller is not None and caller.tool_calls and turns[index - 1] is caller:
            notes.append("tool_call_without_result")
        caller = turn


def _check_result(result: Message, index: int, caller: Message | None, notes: list[str]) -> None:
    if caller is None or not caller.tool_calls:
        if caller is None or caller.role != "assistant" or not CALL_IN_TEXT.search(caller.content):
            raise RowFault(
                "ROW_BAD_TOOL_CALL",
                f"turn {index}: a tool result without a call before it",
                "Put the assistant's tool call before its result.",
            )
        notes.append("tool_call_as_text")
        return
    answered = result.tool_call_id
    ids = {call.id for call in caller.tool_calls if call.id} if answered is not None else set()
    if ids and answered not in ids:
        raise RowFault(
            "ROW_BAD_TOOL_CALL",
            f"turn {index}: result for the unknown call {visible(str(answered), 40)!r}",
            "`tool_call_id` must name a call of the turn before.",
        )
