"""Acceptance prompts: a YAML file of questions, each with a check its answer must pass.

    version: 1
    name: my-acceptance
    max_new_tokens: 32
    prompts:
      - id: capital-en-france
        tags: [capital, en]
        messages: [{role: user, content: "What is the capital of France?"}]
        check: {contains: Paris}
        must_stop: true

The keys of a check are all required to hold: `contains` and `not_contains` (whole words, any case; of a list all,
or none), `equals` (any of a list; case, outer blanks and final punctuation do not count), `regex` (found anywhere)
and `function` (a judge by name, `list_of:3`). `must_stop` (the default) asks the answer to end by itself.
Importing this module loads no torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_args

from finetuneflow.config import BUNDLED_SUITES, parse_yaml
from finetuneflow.data.examples import Message, Role
from finetuneflow.errors import ConfigError, EvaluationError
from finetuneflow.evaluation.judges import BUILT_IN, Judge, contains_words, search_with_limit
from finetuneflow.evaluation.scores import normalise

if TYPE_CHECKING:
    from finetuneflow.evaluation.samples import Progress
    from finetuneflow.inference import Generation, Generator

SUITE_VERSION = 1
MAX_PATTERN_CHARS = 500
SUITE_KEYS = frozenset({"version", "name", "max_new_tokens", "prompts"})
PROMPT_KEYS = frozenset({"id", "tags", "messages", "check", "must_stop"})
CHECK_KEYS = frozenset({"contains", "not_contains", "equals", "regex", "function"})


@dataclass(frozen=True, slots=True)
class Check:
    """What an answer must satisfy; all parts together. Empty parts ask nothing."""

    contains: tuple[str, ...] = ()
    not_contains: tuple[str, ...] = ()
    equals: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    function: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SuitePrompt:
    id: str
    messages: tuple[Message, ...]
    check: Check
    tags: tuple[str, ...] = ()
    must_stop: bool = True


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    prompts: tuple[SuitePrompt, ...]
    max_new_tokens: int = 128


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """One judged answer. `reasons` says what failed; empty when it passed."""

    id: str
    tags: tuple[str, ...]
    prompt: str
    answer: str
    stopped: bool
    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """All judged answers of one model on one suite."""

    suite: str
    items: tuple[SuiteItem, ...]

    @property
    def passed(self) -> int:
        return sum(item.passed for item in self.items)

    @property
    def pass_share(self) -> float:
        """Share of prompts passed, 0 to 1."""
        return self.passed / len(self.items)

    @property
    def failures(self) -> tuple[SuiteItem, ...]:
        return tuple(item for item in self.items if not item.passed)

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Per tag, in order of first appearance: prompts, passed, pass_share."""
        result = {}
        for tag in dict.fromkeys(tag for item in self.items for tag in item.tags):
            outcomes = [item.passed for item in self.items if tag in item.tags]
            result[tag] = {"prompts": len(outcomes), "passed": sum(outcomes), "pass_share": sum(outcomes) / len(outcomes)}
        return result

    def to_dict(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "prompts": len(self.items),
            "passed": self.passed,
            "pass_share": self.pass_share,
            "by_tag": self.by_tag(),
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SuiteResult:
        """Read back what `to_dict` wrote."""
        items = [SuiteItem(**{**item, "tags": tuple(item["tags"]), "reasons": tuple(item["reasons"])}) for item in value["items"]]
        return cls(value["suite"], tuple(items))


# --- reading ------------------------------------------------------------------------------------


def load_suite(path: Path | str) -> Suite:
    """Read and validate a suite (some are bundled: `starter`); the first mistake is an error that names file, item and key."""
    if path in BUNDLED_SUITES:
        from finetuneflow.models.starter import starter_path

        path = starter_path() / BUNDLED_SUITES[str(path)]
    path = Path(path)
    try:
        value = parse_yaml(path.read_text(encoding="utf-8-sig"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError("SUITE_INVALID", f"The suite cannot be read: {error}.", where=str(path)) from error
    except ConfigError as error:
        raise EvaluationError("SUITE_INVALID", error.message, where=error.where, remedy=error.remedy) from error
    return parse_suite(value, where=str(path))


def parse_suite(value: Any, *, where: str = "suite") -> Suite:
    """Build a suite from plain values, as YAML gives them."""
    if not isinstance(value, dict):
        _refuse("A suite is a mapping with version, name and prompts", where)
    _known_keys(value, SUITE_KEYS, where)
    if value.get("version") != SUITE_VERSION:
        _refuse(f"version must be {SUITE_VERSION} (found {value.get('version')!r})", where)
    prompts = value.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        _refuse("prompts must be a list with at least one item", where)
    parsed = [_prompt(item, f"{where}: prompts[{number}]") for number, item in enumerate(prompts)]
    seen: set[str] = set()
    for prompt in parsed:
        if prompt.id in seen:
            _refuse(f"the id {prompt.id!r} is used twice", where)
        seen.add(prompt.id)
    limit = value.get("max_new_tokens", 128)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 32_768:
        _refuse(f"max_new_tokens must be a whole number from 1 to 32768 (found {limit!r})", where)
    return Suite(_text(value.get("name"), "name", where), tuple(parsed), limit)


def _prompt(item: Any, where: str) -> SuitePrompt:
    if not isinstance(item, dict):
        _refuse("a prompt is a mapping with id, messages and check", where)
    where = f"{where} ({item.get('id', 'without id')})"
    _known_keys(item, PROMPT_KEYS, where)
    must_stop = item.get("must_stop", True)
    if not isinstance(must_stop, bool):
        _refuse(f"must_stop is true or false (found {must_stop!r})", where)
    return SuitePrompt(
        id=_text(item.get("id"), "id", where),
        messages=_messages(item.get("messages"), where),
        check=_check(item.get("check"), where),
        tags=_texts(item.get("tags", []), "tags", where),
        must_stop=must_stop,
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _refuse("messages must be a list with at least one turn", where)
    turns = []
    for number, turn in enumerate(value):
        place = f"{where}: messages[{number}]"
        if not isinstance(turn, dict):
            _refuse("a turn is {role: …, content: …}", place)
        _known_keys(turn, frozenset({"role", "content"}), place)
        role = turn.get("role")
        if role not in get_args(Role):
            _refuse(f"role must be one of {', '.join(get_args(Role))} (found {role!r})", place)
        turns.append(Message(cast(Role, role), _text(turn.get("content"), "content", place)))
    if turns[-1].role == "assistant":
        _refuse("the last turn is the assistant's: there is nothing left to answer", where)
    return tuple(turns)


def _check(value: Any, where: str) -> Check:
    where = f"{where}: check"
    if not isinstance(value, dict) or not value:
        _refuse(f"a check names at least one of {', '.join(sorted(CHECK_KEYS))}", where)
    _known_keys(value, CHECK_KEYS, where)
    parts = {key: _texts(wanted, key, where) for key, wanted in value.items()}
    for key, texts in parts.items():
        if not texts:
            _refuse(f"{key} is empty", where)
    for pattern in parts.get("regex", ()):
        _check_pattern(pattern, where)
    return Check(**parts)


def _check_pattern(pattern: str, where: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARS:
        _refuse(f"a regex has at most {MAX_PATTERN_CHARS} characters (found {len(pattern)})", where)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        _refuse(f"the regex {pattern[:60]!r} is not valid: {error}", where)


def _known_keys(value: Mapping[Any, Any], known: frozenset[str], where: str) -> None:
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
        _refuse(f"unknown key {unknown[0]!r}{hint}", where)


def _text(value: Any, key: str, where: str) -> str:
    # YAML reads `content: 4` as a number; what was meant is plain.
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        _refuse(f"{key} must be a text that is not empty (found {value!r})", where)
    return str(value)


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    return tuple(_text(item, key, where) for item in (value if isinstance(value, list) else [value]))


def _refuse(what: str, where: str) -> NoReturn:
    raise EvaluationError("SUITE_INVALID", f"{what}.", where=where, remedy="Mend that place of the suite.")


# --- judging ------------------------------------------------------------------------------------


def require_judges(suite: Suite, judges: Mapping[str, Judge]) -> None:
    """Every judge that the suite names must be there before an answer is generated."""
    for prompt in suite.prompts:
        for function in prompt.check.function:
            name = function.partition(":")[0]
            if name not in judges:
                raise EvaluationError(
                    "JUDGES_INVALID",
                    f"The prompt {prompt.id!r} asks for the judge {name!r}, which is not there.",
                    remedy=f"Known: {', '.join(sorted(judges))}. Add your own with --judges FILE.py.",
                )


def judge_answer(prompt: SuitePrompt, answer: str, *, stopped: bool, judges: Mapping[str, Judge]) -> tuple[str, ...]:
    """Why the answer fails; empty when it passes."""
    check, reasons = prompt.check, []
    reasons += [f"does not contain {text!r}" for text in check.contains if not contains_words(answer, text)]
    reasons += [f"contains {text!r}" for text in check.not_contains if contains_words(answer, text)]
    if check.equals and normalise(answer) not in {normalise(text) for text in check.equals}:
        reasons.append(f"is not {' or '.join(map(repr, check.equals))}")
    reasons += [reason for pattern in check.regex if (reason := search_with_limit(pattern, answer)) is not None]
    reasons += [reason for function in check.function if (reason := _ask_judge(function, answer, judges)) is not None]
    if prompt.must_stop and not stopped:
        reasons.append("did not end its turn")
    return tuple(reasons)


def _ask_judge(function: str, answer: str, judges: Mapping[str, Judge]) -> str | None:
    name, _, argument = function.partition(":")
    judge = judges[name]
    try:
        takes_argument = len(inspect.signature(judge).parameters) > 1
        outcome = judge(answer, argument) if takes_argument else judge(answer)
    except Exception as error:
        raise EvaluationError(
            "JUDGES_INVALID",
            f"The judge {function!r} failed: {type(error).__name__}: {error}.",
            remedy="Mend the judge or its argument.",
        ) from error
    if outcome is True:
        return None
    return outcome if isinstance(outcome, str) else f"fails {function}"


def judge_answers(suite: Suite, answers: Sequence[Generation], *, judges: Mapping[str, Judge] | None = None) -> SuiteResult:
    """Judge one answer per prompt. `judges` are added to the built-in ones (or replace one of the same name)."""
    known = {**BUILT_IN, **(judges or {})}
    require_judges(suite, known)
    items = []
    for prompt, answer in zip(suite.prompts, answers, strict=True):
        reasons = judge_answer(prompt, answer.text, stopped=answer.stopped, judges=known)
        items.append(
            SuiteItem(prompt.id, prompt.tags, prompt.messages[-1].content, answer.text, answer.stopped, not reasons, reasons)
        )
    return SuiteResult(suite.name, tuple(items))


def run_suite(
    generator: Generator,
    suite: Suite,
    *,
    judges: Mapping[str, Callable[..., bool | str]] | None = None,
    batch_size: int = 32,
    resume_path: Path | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Answer every prompt greedily and judge the answers; `resume_path` keeps answers of an interrupted run."""
    from finetuneflow.evaluation.samples import answer_all
    from finetuneflow.inference import Decoding

    require_judges(suite, {**BUILT_IN, **(judges or {})})
    prompts = [generator.prompt_ids(prompt.messages) for prompt in suite.prompts]
    decoding = Decoding(max_new_tokens=suite.max_new_tokens)
    answers = answer_all(generator, prompts, decoding, batch_size=batch_size, resume_path=resume_path, progress=progress)
    return judge_answers(suite, answers, judges=judges)
