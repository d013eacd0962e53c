"""Chat templates: which one a model gets, what it writes, and where its answers stand.

Place in the flow: `resolve_template(tokenizer, name)` once per run; `tokens.tokenize` uses the Template per row, and
`inference` asks it for `prompt_ids`, so training and inference build the very same tokens.

The tokenizer's own template comes first; a named one replaces it only with consent, since a model that was taught
one format and is tuned on another forgets how to end its turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from finetuneflow.data.builtin_templates import BUILT_IN
from finetuneflow.data.encoding import PRIVATE, Encoder
from finetuneflow.data.examples import Message
from finetuneflow.data.sandbox import FIXED_DATE, CompiledTemplate, TemplateRefusal
from finetuneflow.data.spans import (
    Anatomy,
    Located,
    Skeleton,
    SpansNotFound,
    Turn,
    locate,
    probe,
    shape_of,
    skeleton,
    tools_key,
)
from finetuneflow.errors import DataError
from finetuneflow.workspace import read_json_object

__all__ = ["BUILT_IN", "Origin", "Template", "resolve_template"]

Origin = Literal["tokenizer", "built-in", "file"]
_MAX_SHAPES = 4096  # skeletons kept; each is a few hundred bytes


@dataclass(eq=False)
class Template:
    """A chat template bound to one tokenizer.

    `digest` changes when anything changes that decides the tokens: source, special tokens, the fixed date.
    `turn_end` are the ids that end an answer; `stop` its text. `notes` say what was found and chosen, for people.
    `differs` is True when the tokenizer has its own template and this one writes something else (with consent).
    Not thread-safe while tokenizing; processes each make their own.
    """

    name: str
    origin: Origin
    source: str
    tokenizer: Any
    digest: str
    anatomy: Anatomy
    takes_system: bool
    differs: bool
    turn_end: tuple[int, ...]
    bos_id: int | None
    adds_bos: bool
    notes: tuple[str, ...]
    encoder: Encoder
    _compiled: CompiledTemplate
    _variables: dict[str, str]
    _shapes: dict[Any, Skeleton | None] = field(default_factory=dict)

    @property
    def eos_id(self) -> int | None:
        return None if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    def protect(self, text: str) -> str:
        """A document's text, with control tokens in it as stand-ins. Raises DataError TEXT_PRIVATE_CHARACTERS."""
        return _safe(text, self.encoder, False)

    @property
    def stop(self) -> str:
        """The text that ends an answer, for stop strings at inference."""
        return self.anatomy.turn_end

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text, as the model would see it."""
        render = _Renderer(self._compiled, self._variables, list(tools))
        return render(self._turns(messages, protect=False), add_generation_prompt)

    def locate(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Located:
        """The conversation as text with its answers; people's control tokens are stand-ins (`encoder` knows them).

        Raises SpansNotFound, TemplateRefusal, or DataError TEXT_PRIVATE_CHARACTERS.
        """
        turns = self._turns(messages, protect=True)
        safe_tools = [_protect_values(tool, self.encoder) for tool in tools]
        render = _Renderer(self._compiled, self._variables, safe_tools)
        shape = shape_of(turns)
        if shape is not None:
            frame = self._skeleton(shape, render, safe_tools)
            if frame is not None:
                filled = frame.fill([turn["content"] for turn in turns])
                if filled.text == render(turns, False):
                    return filled
        return _locate_with_any_call_ids(render, self.anatomy, turns)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids up to and with the generation prompt, the very tokens that stand before an answer in training."""
        if not self.anatomy.exact:
            return self._prompt_of_training(messages, tools)
        turns = self._turns(messages, protect=True)
        render = _Renderer(self._compiled, self._variables, [_protect_values(tool, self.encoder) for tool in tools])
        prompt = render(turns, True) + self.anatomy.header
        return self._ids_before_answer(prompt)

    def _prompt_of_training(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """For templates whose generation prompt is not what they write before answers: a short answer, rendered and cut off."""
        located = self.locate([*messages, _ANSWER], tools)
        if not located.answers or located.answers[-1].message != located.turns - 1:
            raise SpansNotFound(
                "TEMPLATE_NO_SPANS", f"The template {self.name!r} gives no place for an answer to these messages."
            )
        return self._ids_before_answer(located.text[: located.answers[-1].start])

    def _ids_before_answer(self, prompt: str) -> list[int]:
        """The prompt's tokens as they are when an answer follows.

        Encoded alone, a prompt's end may become another token than in training: GPT-2 writes two line ends as one token,
        but as two before a word; a space joins the next word. So a word is put after the prompt and taken away again,
        and with it the token that reaches into it: the model writes that one, as it learned to.
        """
        text = f"{prompt}{self.anatomy.lead}It"
        encoded = self.encoder.encode(text)
        return encoded.ids[: encoded.first_token(len(prompt), len(text))]

    def _skeleton(self, shape: Any, render: _Renderer, tools: Sequence[dict[str, Any]]) -> Skeleton | None:
        key = (shape, tools_key(tools))
        if key not in self._shapes:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.pop(next(iter(self._shapes)))
            try:
                self._shapes[key] = skeleton(render, self.anatomy, shape)
            except (TemplateRefusal, SpansNotFound):
                self._shapes[key] = None  # the long way will say why, with the row's own contents
        return self._shapes[key]

    def _turns(self, messages: Sequence[Message], *, protect: bool) -> list[Turn]:
        turns = [_as_turn(message, self.encoder if protect else None) for message in messages]
        return turns if self.takes_system else _merge_system(turns)


@dataclass(frozen=True, slots=True)
class _Renderer:
    """One conversation's fixed surroundings (tools, special tokens), called with messages."""

    compiled: CompiledTemplate
    variables: Mapping[str, str]
    tools: list[dict[str, Any]]

    def __call__(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        return self.compiled.render(
            messages=list(turns),
            tools=self.tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )


# Messages as templates expect them ------------------------------------------------------------------------------------


def _as_turn(message: Message, encoder: Encoder | None) -> Turn:
    assistant = message.role == "assistant"
    turn: Turn = {"role": message.role, "content": _safe(message.content, encoder, assistant)}
    if message.name is not None:
        turn["name"] = _safe(message.name, encoder, assistant)
    if message.tool_call_id is not None:
        turn["tool_call_id"] = _safe(message.tool_call_id, encoder, assistant)
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id or f"call{number:05d}",  # nine characters, which some templates insist on
                "type": "function",
                "function": {
                    "name": _safe(call.name, encoder, assistant),
                    "arguments": _protect_values(call.arguments, encoder, assistant=True) if encoder else call.arguments,
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return turn


def _safe(text: str, encoder: Encoder | None, assistant: bool) -> str:
    if encoder is None:
        return text
    if not text.isascii() and PRIVATE.search(text):
        raise DataError(
            "TEXT_PRIVATE_CHARACTERS",
            "The text holds private-use characters (U+100000 to U+10FFFF), which are reserved for finding spans.",
            remedy="Remove these characters; no font or standard gives them a meaning.",
        )
    return encoder.protect(text, assistant=assistant)


def _protect_values(value: Any, encoder: Encoder, *, assistant: bool = False) -> Any:
    """Every text within a JSON value protected (keys too: they are people's text as well)."""
    if isinstance(value, str):
        return _safe(value, encoder, assistant)
    if isinstance(value, dict):
        return {
            _safe(str(key), encoder, assistant): _protect_values(item, encoder, assistant=assistant)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_protect_values(item, encoder, assistant=assistant) for item in value]
    return value


def _merge_system(turns: list[Turn]) -> list[Turn]:
    """For templates without a system role: its text goes before the first question, as their makers advise."""
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return turns
    system, first = turns[0]["content"].strip(), turns[1]
    content = f"{system}\n\n{first['content']}" if system else first["content"]
    return [{**first, "content": content}, *turns[2:]]


def _locate_with_any_call_ids(render: _Renderer, anatomy: Anatomy, turns: list[Turn]) -> Located:
    """Some templates insist on call ids of nine characters: when one refuses, ids are renumbered and it is asked again."""
    try:
        return locate(render, anatomy, turns)
    except TemplateRefusal as refusal:
        if "9" not in refusal.message and "nine" not in refusal.message:
            raise
        return locate(render, anatomy, _renumber_calls(turns))


def _renumber_calls(turns: list[Turn]) -> list[Turn]:
    numbers: dict[str, str] = {}
    pending: list[str] = []
    renumbered: list[Turn] = []
    for turn in turns:
        turn = dict(turn)
        if calls := turn.get("tool_calls"):
            for call in calls:
                numbers[call["id"]] = f"call{len(numbers):05d}"
            turn["tool_calls"] = [{**call, "id": numbers[call["id"]]} for call in calls]
            pending = [call["id"] for call in turn["tool_calls"]]
        if turn["role"] == "tool":
            given = turn.get("tool_call_id")
            turn["tool_call_id"] = numbers.get(given or "", pending.pop(0) if pending else f"call{len(numbers):05d}")
        renumbered.append(turn)
    return renumbered


# Choosing and binding -------------------------------------------------------------------------------------------------


def resolve_template(tokenizer: Any, name: str = "auto", *, consent: bool = False, today: date = FIXED_DATE) -> Template:
    """The template for a tokenizer.

    `auto`: the tokenizer's own, else `plain` (a base model), with a note. A built-in name or a path to a `.jinja` file is
    used as asked; if the tokenizer has its own template and that writes something else, `consent` must be given.
    `today` is what a template gets that asks for the date; it is part of the digest.
    Raises DataError: TEMPLATE_UNKNOWN, TEMPLATE_INVALID, TEMPLATE_NO_SPANS, TEMPLATE_MISMATCH, …
    """
    own = _own_source(tokenizer)
    if name in ("auto", "own") and own is not None:
        return _bind(tokenizer, "tokenizer's own", "tokenizer", own, today, ())
    if name == "own":
        raise DataError(
            "TEMPLATE_UNKNOWN", "This tokenizer has no chat template of its own.", remedy="Set template: auto or a built-in name."
        )
    if name == "auto":
        note = "The tokenizer has no chat template (a base model); the plain form `User: … / Assistant: …` is used."
        return _bind(tokenizer, "plain", "built-in", BUILT_IN["plain"], today, (note,))
    source, origin = _named_source(name)
    chosen = _bind(tokenizer, name, origin, source, today, ())
    if own is not None and _writes_other_text(tokenizer, own, chosen, today):
        if not consent:
            raise _mismatch(name)
        chosen.differs = True
        chosen.notes += (f"Template {name!r} writes something else than the tokenizer's own; used with your consent.",)
    return chosen


def template_of_run(run: Path, tokenizer: Any) -> Template:
    """The template a run was trained with, by the run's own record of it."""
    source = read_json_object(run / "template.json").get("source")
    if not isinstance(source, str):
        raise DataError(
            "TEMPLATE_INVALID",
            f"{run.name} holds no readable template.json, so its conversations cannot be written as they were in training.",
            where=str(run / "template.json"),
            remedy="Copy the run directory again, whole, or train anew.",
        )
    tokenizer.chat_template = source
    return resolve_template(tokenizer)


def _own_source(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several named ones, the one called default."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    return str(own) if own else None


def _named_source(name: str) -> tuple[str, Origin]:
    if name in BUILT_IN:
        return BUILT_IN[name], "built-in"
    path = Path(name)
    if path.suffix in (".jinja", ".jinja2", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8"), "file"
    near = get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    raise DataError(
        "TEMPLATE_UNKNOWN",
        f"No chat template is called {name!r}, and no .jinja file is there.",
        where="template",
        remedy=f"{guess}Built in: {', '.join(BUILT_IN)}; or auto, own, or a path to a .jinja file.",
    )


def _mismatch(name: str) -> DataError:
    return DataError(
        "TEMPLATE_MISMATCH",
        f"The template {name!r} writes something else than the template this tokenizer comes with.",
        where="template",
        remedy="Use template: auto (the model was taught that format), or consent to the change with template_consent: true.",
    )


def _bind(tokenizer: Any, name: str, origin: Origin, source: str, today: date, notes: tuple[str, ...]) -> Template:
    """Compile, probe and describe a template for a tokenizer."""
    adds_bos = _adds_bos(tokenizer)
    source = source.replace("{{- BOS }}", "{{- bos_token }}" if adds_bos else "") if origin == "built-in" else source
    compiled = CompiledTemplate(source, name, today)
    variables = _special_tokens(tokenizer)
    encoder = Encoder(tokenizer, source)
    render = _Renderer(compiled, variables, [])
    anatomy = _probe(render, encoder)
    takes_system = _takes_system(render)
    template = Template(
        name=name,
        origin=origin,
        source=source,
        tokenizer=tokenizer,
        digest=_digest(source, variables, today),
        anatomy=anatomy,
        takes_system=takes_system,
        differs=False,
        turn_end=(),
        bos_id=tokenizer.bos_token_id,
        adds_bos=adds_bos,
        notes=notes,
        encoder=encoder,
        _compiled=compiled,
        _variables=variables,
    )
    template.turn_end = _turn_end_ids(template)
    template.notes += tuple(_notes(template))
    return template


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {"bos_token": "", "eos_token": "", **names}


def _digest(source: str, variables: Mapping[str, str], today: date) -> str:
    facts = [source, *(f"{key}={value}" for key, value in sorted(variables.items()))]
    if "strftime_now" in source:
        facts.append(today.isoformat())
    return hashlib.sha256("\x00".join(facts).encode()).hexdigest()


def _probe(render: _Renderer, encoder: Encoder) -> Anatomy:
    """Anatomy of a template. A refusal here means it cannot even take one question and one answer."""

    def is_token(text: str) -> str | None:
        return max((token for token in encoder.added if text.startswith(token)), key=len, default=None)

    try:
        return probe(render, is_token)
    except TemplateRefusal as refusal:
        raise SpansNotFound(
            "TEMPLATE_NO_SPANS",
            f"The chat template {render.compiled.name!r} refuses even one plain question and answer: {refusal.message}",
            where=render.compiled.name,
            remedy="Use a built-in template (template: chatml, llama3, mistral, gemma, plain, …).",
        ) from refusal


def _takes_system(render: _Renderer) -> bool:
    """Whether a system message ends up in the text, alone with a question and with an answer after it."""
    turns: list[Turn] = [
        {"role": "system", "content": "SYSTEM-TEXT"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    try:
        return all("SYSTEM-TEXT" in render(turns[:count], count == 2) for count in (2, 3))
    except TemplateRefusal:
        return False


_QUESTION, _ANSWER = Message("user", "What is it?"), Message("assistant", "It is.")


def _turn_end_ids(template: Template) -> tuple[int, ...]:
    """The ids that close an answer, read off a plain conversation."""
    located = template.locate([_QUESTION, _ANSWER])
    answer = located.answers[0] if located.answers else None
    if answer is None or not answer.ended:
        return ()
    begin = located.text.rindex(template.stop, answer.mark, answer.end)
    encoded = template.encoder.encode(located.text)
    return tuple(encoded.ids[encoded.first_token(begin, answer.end) : encoded.first_token(answer.end, len(located.text))])


def _notes(template: Template) -> list[str]:
    notes = []
    if not template.takes_system:
        notes.append("The template has no place for a system message: its text is put before the first question.")
    if not template.anatomy.turn_end:
        notes.append("The template ends an answer with nothing: a model trained with it would not learn to stop.")
    elif len(template.turn_end) > 1:
        notes.append(
            f"The end of a turn, {template.stop!r}, is not one token of this tokenizer but {len(template.turn_end)} ordinary ones; "
            "inference stops on the text."
        )
    if template.anatomy.header:
        notes.append("The template writes a header before answers but has no generation prompt; inference adds the header.")
    if not template.anatomy.exact:
        notes.append(
            "The generation prompt differs in white space or beyond from what stands before answers; inference follows the answers."
        )
    return notes


def _writes_other_text(tokenizer: Any, own: str, chosen: Template, today: date) -> bool:
    """Whether two templates differ on a short and a longer conversation (compared as text, not as source)."""
    render = _Renderer(CompiledTemplate(own, "tokenizer's own", today), _special_tokens(tokenizer), [])
    turns: list[Turn] = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    mine = _Renderer(chosen._compiled, chosen._variables, [])
    try:
        return any(render(turns[:count], count != 2) != mine(turns[:count], count != 2) for count in (1, 2, 3))
    except TemplateRefusal:
        return True
