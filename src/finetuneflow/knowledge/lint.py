"""The linter: what is wrong or doubtful in a run before it starts, why, and which setting mends it.

    check          findings for a situation, errors first
    skipped        rules that could not look, and the facts they lack
    apply_fixes    a run file's settings with the fixes of findings
    fix            the same until nothing safe is left, refusing a fix that would bring a new error
    rule_page      the page that explains a code; the pages are packaged beside this module (`rules/CODE.md`)

The rules stand in `rules/` by topic. Each is a plain function; `situation.py` says what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from finetuneflow.config import settings
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.rules import adapter, data, hardware, model, preference, rate, reinforcement, steps
from finetuneflow.knowledge.situation import LEVELS, Finding, Level, Rule, Situation, completed

__all__ = [
    "RULES",
    "Applied",
    "Finding",
    "Level",
    "Rule",
    "Situation",
    "apply_fixes",
    "check",
    "fix",
    "rule_page",
    "rule_pages",
    "skipped",
]

_TOPICS = (data, model, adapter, rate, preference, reinforcement, steps, hardware)
RULES: dict[str, Rule] = {rule.code: rule for topic in _TOPICS for rule in vars(topic).values() if isinstance(rule, Rule)}
ROUNDS = 2 * len(RULES)  # one fix can make room for another; more would be two rules that contradict each other


def check(situation: Situation) -> list[Finding]:
    """Everything that is found, errors first, then by topic. Never raises for a valid configuration."""
    situation = completed(situation)
    found = [finding for rule in RULES.values() if (finding := rule(situation)) is not None]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def skipped(situation: Situation) -> list[tuple[str, str]]:
    """(code, missing facts) of the rules that could not look."""
    situation = completed(situation)
    return [(rule.code, ", ".join(missing)) for rule in RULES.values() if (missing := rule.missing(situation))]


# --- fixes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Applied:
    """What fixing gave: the whole settings, those changed by dotted name, a line for each change, and the codes fixed."""

    values: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    difference: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()


def apply_fixes(config_values: Mapping[str, Any], findings: Sequence[Finding], safe_only: bool = True) -> Applied:
    """`config_values` (nested, as in a run file) with the fixes of findings. The first finding to touch a setting decides."""
    values: dict[str, Any] = deepcopy(dict(config_values))
    overrides: dict[str, Any] = {}
    lines: list[str] = []
    codes: list[str] = []
    for finding in findings:
        if not finding.fix or (safe_only and not finding.safe):
            continue
        if any(key in overrides and overrides[key] != value for key, value in finding.fix.items()):
            continue
        news = {key: value for key, value in finding.fix.items() if key not in overrides}
        for key, value in news.items():
            lines.append(f"{key}: {_shown(_value_in(values, key))} -> {_shown(value)}  ({finding.code})")
            _put(values, key, value)
        overrides |= news
        codes.append(finding.code)
    return Applied(values, overrides, tuple(lines), tuple(codes))


def fix(situation: Situation, config_values: Mapping[str, Any]) -> Applied:
    """Apply safe fixes one by one until none is left. A fix that would bring a new error is left out.

    `config_values` are those that `situation.config` was made of; facts that follow from the settings are computed anew.
    """
    applied = Applied(deepcopy(dict(config_values)))
    for _ in range(ROUNDS):
        step = _one_fix(situation)
        if step is None:
            break
        finding, situation = step
        more = apply_fixes(applied.values, [finding])
        applied = Applied(
            more.values,
            {**applied.overrides, **more.overrides},
            (*applied.difference, *more.difference),
            (*applied.codes, *more.codes),
        )
    return applied


def _one_fix(situation: Situation) -> tuple[Finding, Situation] | None:
    before = check(situation)
    errors = {finding.code for finding in before if finding.level == "error"}
    for finding in before:
        if not finding.safe or not finding.fix:
            continue
        after = situation.changed(finding.fix)
        found = check(after)
        gone = finding.code not in {other.code for other in found}
        if gone and not {other.code for other in found if other.level == "error"} - errors:
            return finding, after
    return None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    values[last] = value


def _value_in(values: Mapping[str, Any], key: str) -> Any:
    inner: Any = values
    for part in key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return next(default for name, _, default, _ in settings() if name == key)
        inner = inner[part]
    return inner


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# --- pages --------------------------------------------------------------------------------------------


def rule_page(code: str) -> str:
    """The page of a rule as Markdown. Raises `ConfigError` (CONFIG_INVALID_VALUE) for a code that no rule has."""
    if code not in RULES:
        raise ConfigError("CONFIG_INVALID_VALUE", f"No rule has the code {code!r}.", remedy="`docs/rules/README.md` lists them.")
    return resources.files("finetuneflow.knowledge").joinpath("rules", f"{code}.md").read_text(encoding="utf-8")


def rule_pages() -> dict[str, str]:
    """Every file of `docs/rules/`: README.md, the table of all rules, and a page for each."""
    rows = [f"| [`{rule.code}`]({rule.code}.md) | {rule.level} | {rule.title} |" for rule in _by_level()]
    head = (
        "# Rules of `ftf lint`\n\nAn error stops the run or makes its result worthless; a warning costs quality or time in most "
        "cases; advice is worth a look.\n`ftf explain CODE` prints a page.\n\n| code | level | what it finds |\n|---|---|---|\n"
    )
    note = "<!-- Generated by docs/generate.py; do not edit. -->\n\n"
    pages = {f"{code}.md": note + rule_page(code) for code in RULES}
    return {"README.md": note + head + "\n".join(rows) + "\n", **pages}


def _by_level() -> list[Rule]:
    return sorted(RULES.values(), key=lambda rule: (LEVELS.index(rule.level), rule.code))
