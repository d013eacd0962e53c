"""Why a run failed, and what to do about it: from its error code, output and exit status to a cause and ranked remedies.

    diagnose       a failed run -> `Diagnosis`; memory remedies are computed for this run where a prediction is at hand
    explain_code   the page of an error code, of a warning of a run or of a rule of the linter

The cases are data (`causes.yaml`), as are the sentences on what to do (`error_help.yaml`). The output of a run is foreign
text: it is cut to its beginning and end, stripped of terminal sequences, and searched with bounded patterns only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from finetuneflow.config import RunConfig
from finetuneflow.errors import CODES, ConfigError
from finetuneflow.knowledge import remedies
from finetuneflow.knowledge.memory import Estimate
from finetuneflow.knowledge.remedies import MemoryFigures, Remedy, WhatIf
from finetuneflow.knowledge.run_warnings import WARNINGS
from finetuneflow.knowledge.values import Machine

__all__ = ["Diagnosis", "MemoryFigures", "Remedy", "diagnose", "explain_code"]

HEAD, TAIL = 50_000, 200_000  # characters of the output that are looked at: its beginning, and its end, where errors stand
MAX_LINE = 2_000
EVIDENCE = 300
# Codes that say no more than that something failed: the output knows better.
VAGUE_CODES = frozenset({"TRAINING_FAILED", "UNEXPECTED", "VERIFY_FAILED", "MODEL_CORRUPT", "MODEL_UNSUPPORTED_ARCH"})
# Of a killed process, only these cases explain the kill; others may have been warnings on the way.
BEFORE_SIGNALS = frozenset({"cuda-out-of-memory", "shared-memory", "disk-full", "host-out-of-memory"})
ABORT = 6  # says nothing by itself: the words before it do


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`case`: a stable short name ("unknown" where nothing fits). `evidence`: the line or status the cause was read from."""

    case: str
    code: str | None
    cause: str
    evidence: str
    remedies: tuple[Remedy, ...]
    memory: MemoryFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of failure, as `causes.yaml` describes it."""

    name: str
    code: str
    cause: str
    remedies: tuple[dict[str, Any], ...]
    words: tuple[str, ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    signals: tuple[int, ...] = ()
    statuses: tuple[int, ...] = ()
    computed: str | None = None

    def find(self, text: str) -> int | None:
        """Where the last sign stands in lower-case text."""
        ends = [place for word in self.words if (place := text.rfind(word)) >= 0]
        ends += [match.start() for pattern in self.patterns for match in pattern.finditer(text)]
        return max(ends, default=None)


@dataclass(frozen=True, slots=True)
class Failure:
    """Everything known about one failure; what the functions that compute remedies are given."""

    text: str
    line: str
    config: RunConfig | None = None
    estimate: Estimate | None = None
    machine: Machine | None = None
    what_if: WhatIf | None = None
    figures: MemoryFigures = field(default_factory=MemoryFigures)


def diagnose(
    code: str | None,
    text: str,
    exit_status: int | None,
    *,
    config: RunConfig | None = None,
    estimate: Estimate | None = None,
    machine: Machine | None = None,
    what_if: WhatIf | None = None,
) -> Diagnosis:
    """The most likely cause of a failure and its remedies, least harm first. Never raises for any text or status.

    `code`: of the run's last event, if it left one. `text`: its output or error message. `exit_status`: of the process;
    -9 and 137 both mean signal 9. `what_if(settings)`: predicted peak bytes with other settings ({}: as it is).
    """
    plain = clean(text)
    on_cpu = machine is not None and machine.kind == "cpu"
    case, place = _choose(code, plain.translate(_LOWER), exit_status, on_cpu=on_cpu)
    if case is None:
        return _unknown(code, plain, exit_status)
    line = _line_at(plain, place) if place is not None else _status_words(code, exit_status)
    failure = Failure(plain, line, config, estimate, machine, what_if, remedies.memory_figures(plain))
    computed = COMPUTED[case.computed](failure) if case.computed else ()
    fill = {"base": _base(failure), "page": _page(failure), "detail": _capabilities(plain)}
    general = (
        Remedy(remedy["text"].format_map(fill), dict(remedy.get("settings", {})), command=_command(remedy))
        for remedy in case.remedies
    )
    return Diagnosis(
        case=case.name,
        code=code if code in CODES else case.code,
        cause=case.cause.format_map(fill),
        evidence=_presentable(line),
        remedies=(*computed, *general),
        memory=failure.figures if case.computed in ("device_memory", "host_memory") else None,
    )


def _choose(code: str | None, text: str, exit_status: int | None, *, on_cpu: bool) -> tuple[Case | None, int | None]:
    """The case and where its sign stands: memory and disk first, then the run's own word, the signal, the output."""
    number = _signal(exit_status)
    found = [(case, place) for case in cases() if (place := case.find(text)) is not None]
    own = [case for case in cases() if case.code == code and code not in VAGUE_CODES]
    for case, place in found:
        if case in own or case.name in BEFORE_SIGNALS:
            return case, place
    if code == "OUT_OF_MEMORY":
        return next(case for case in own if case.name == ("host-out-of-memory" if on_cpu else "cuda-out-of-memory")), None
    if len(own) == 1:
        return own[0], None
    if code in CODES and code not in VAGUE_CODES:
        return None, None  # the run's own word, for which error_help has the remedy
    if number is not None and number != ABORT:
        for case in cases():
            if number in case.signals:
                return case, None
    if found:
        return found[0]
    for case in cases():
        if exit_status in case.statuses or number in case.signals:
            return case, None
    return None, None


def _unknown(code: str | None, text: str, exit_status: int | None) -> Diagnosis:
    if code in CODES:
        helped = Remedy(what_to_do(code))
        return Diagnosis("error-code", code, CODES[code], _presentable(_last_line(text)) or code, (helped,))
    known = (
        Remedy("Read the whole output; the last lines of the first error usually name the place.", command="ftf logs"),
        Remedy("Check the installation and this machine.", command="ftf doctor"),
        Remedy("Go on from the last complete checkpoint.", command="ftf resume"),
    )
    evidence = _presentable(_last_line(text)) or _status_words(code, exit_status)
    if exit_status == 0 and not _last_line(text):
        return Diagnosis("no-failure", None, "The process ended without an error.", "exit status 0", ())
    return Diagnosis("unknown", None, "The cause is not one that is recognised.", evidence, known)


# --- reading --------------------------------------------------------------------------------------------

# Terminal sequences: CSI, OSC, and other two-character ones. Repetitions are bounded and of disjoint classes.
_ESCAPES = re.compile(r"\x1b\[[0-9;:?]{0,64}[ -/]{0,4}[@-~]?|\x1b\][^\x07\x1b\n]{0,500}(?:\x07|\x1b\\)?|\x1b.?")
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")  # keeps every character's place
_CONTROLS = {number: " " for number in (*range(0x20), *range(0x7F, 0xA0)) if number not in (0x09, 0x0A)}
_BIDI = {number: "" for number in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)}
_SECRETS = re.compile(r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{8,200}|(?i:\bbearer )\S{8,400}")


def clean(text: str) -> str:
    """The beginning and end of an output as plain lines: no escape sequences, control characters or endless lines."""
    if len(text) > HEAD + TAIL:
        text = f"{text[:HEAD]}\n{text[-TAIL:]}"
    text = _ESCAPES.sub("", text).replace("\r", "\n").translate(_CONTROLS | _BIDI)
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be printed
    return "\n".join(part for line in text.split("\n") for part in _pieces(line))


def _pieces(line: str) -> Iterable[str]:
    return (line[start : start + MAX_LINE] for start in range(0, max(len(line), 1), MAX_LINE))


def _line_at(text: str, place: int) -> str:
    end = text.find("\n", place)
    return text[text.rfind("\n", 0, place) + 1 : end if end >= 0 else len(text)]


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if line.strip()), "")


def _presentable(line: str) -> str:
    line = _SECRETS.sub("[secret]", " ".join(line.split()))
    return line if len(line) <= EVIDENCE else f"{line[: EVIDENCE - 1]}…"


def _signal(status: int | None) -> int | None:
    """The signal that ended a process: Python says -9, a shell 137."""
    if status is None:
        return None
    if -64 <= status < 0:
        return -status
    return status - 128 if 128 < status <= 192 else None


def _status_words(code: str | None, status: int | None) -> str:
    if (number := _signal(status)) is not None:
        return f"exit status {status} (signal {number})"
    if status is not None:
        return f"exit status {status}"
    return f"error code {code}" if code in CODES else ""


def _base(failure: Failure) -> str:
    """The model: as the message names it, else the run file's."""
    found = re.search(r"(?:huggingface\.co|hf\.co)/(?:api/models/)?([\w.-]{1,96}/[\w.-]{1,96})", failure.line or "")
    if found is None:
        found = re.search(r"[Aa]ccess to model ([\w.-]{1,96}/[\w.-]{1,96})", failure.text)
    if found is None:
        found = re.search(r"huggingface\.co/(?:api/models/)?([\w.-]{1,96}/[\w.-]{1,96})", failure.text)
    return found.group(1) if found else failure.config.model.base if failure.config else "the model"


def _page(failure: Failure) -> str:
    base = _base(failure)
    return f"https://huggingface.co/{base}" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else "its page on the hub"


def _capabilities(text: str) -> str:
    """` (it is sm_120; built for sm_50 sm_60)`, where the message says so."""
    own = re.search(r"CUDA capability (sm_\d{2,3})", text)
    built = re.search(r"supports CUDA capabilities ((?:sm_\d{2,3}\w? ?){1,20})", text)
    parts = [f"it is {own.group(1)}" if own else "", f"built for {built.group(1).strip()}" if built else ""]
    told = "; ".join(part for part in parts if part)
    return f" ({told})" if told else ""


def _command(remedy: dict[str, Any]) -> str | None:
    command = remedy.get("command")
    return command if command else remedies.command_for(remedy.get("settings", {}))


COMPUTED: dict[str, Callable[[Failure], tuple[Remedy, ...]]] = {
    "device_memory": lambda failure: remedies.for_memory(
        failure.config, failure.figures, failure.estimate, failure.machine, failure.what_if
    ),
    "host_memory": lambda failure: remedies.for_host_memory(
        failure.config, failure.figures, failure.estimate, failure.machine, failure.what_if
    ),
    "non_finite": lambda failure: remedies.for_non_finite(failure.config, failure.machine),
    "disk": lambda failure: remedies.for_disk(failure.config),
    "token_ids": lambda failure: remedies.for_token_ids(failure.config),
    "without_quantization": lambda failure: remedies.without_quantization(failure.config, failure.what_if, failure.estimate),
}


# --- data -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    """Every case, root causes first."""
    return tuple(_case(entry) for entry in _load("causes.yaml"))


def _case(entry: dict[str, Any]) -> Case:
    signs = entry["signs"]
    return Case(
        name=entry["name"],
        code=entry["code"],
        cause=entry["cause"],
        remedies=tuple(entry["remedies"]),
        words=tuple(sign for sign in signs if not sign.startswith("re:")),
        patterns=tuple(re.compile(sign[3:], re.MULTILINE) for sign in signs if sign.startswith("re:")),
        signals=tuple(entry.get("signals", ())),
        statuses=tuple(entry.get("statuses", ())),
        computed=entry.get("computed"),
    )


def _load(name: str) -> Any:
    text = (resources.files("finetuneflow.knowledge") / name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@lru_cache(maxsize=1)
def _help() -> dict[str, dict[str, str]]:
    value: dict[str, dict[str, str]] = _load("error_help.yaml")
    return value


def what_to_do(code: str) -> str:
    """One or two sentences for an error code: its own, else its group's."""
    own, groups = _help()["codes"], _help()["groups"]
    return own.get(code) or groups[code.split("_")[0]]


# --- pages --------------------------------------------------------------------------------------------------


def explain_code(code: str) -> str:
    """The page of a rule of the linter, an error code or a warning. Raises `ConfigError` (CONFIG_INVALID_VALUE) naming near ones."""
    wanted = code.strip().upper() if len(code) <= 200 else ""
    if wanted in CODES:
        return _error_page(wanted)
    if wanted in WARNINGS:
        return f"{wanted}: {WARNINGS[wanted].meaning}\n\nWhat to do: {WARNINGS[wanted].advice}"
    rules = _rule_names()
    if wanted in rules:
        return (resources.files("finetuneflow.knowledge") / "rules" / f"{wanted}.md").read_text(encoding="utf-8")
    near = difflib.get_close_matches(wanted, [*CODES, *WARNINGS, *rules], n=3, cutoff=0.4)
    raise ConfigError(
        "CONFIG_INVALID_VALUE",
        f"There is no error code, warning or rule {_presentable(clean(code))[:60]!r}.",
        remedy=f"Near it: {', '.join(near)}." if near else "`ftf lint`, warnings and error messages name the codes.",
    )


def _rule_names() -> frozenset[str]:
    folder = resources.files("finetuneflow.knowledge") / "rules"
    return frozenset(page.name[:-3] for page in folder.iterdir() if page.name.endswith(".md")) if folder.is_dir() else frozenset()


def _error_page(code: str) -> str:
    lines = [f"{code}: {CODES[code]}", "", f"What to do: {what_to_do(code)}"]
    if causes := [case for case in cases() if case.code == code]:
        lines += ["", "Typical causes:"]
        fill = {"base": "the model", "page": "its page on the hub", "detail": ""}
        for case in causes:
            lines.append(f"- {case.cause.format_map(fill)}")
            for remedy in case.remedies:
                command = _command(remedy)
                lines.append(f"    {remedy['text'].format_map(fill)}" + (f" ({command})" if command else ""))
    return "\n".join(lines)
