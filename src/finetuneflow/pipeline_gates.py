"""Gates: conditions on what a stage of a pipeline reached, as sentences that are read strictly. Loads no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetuneflow.errors import ConfigError

EVAL_FIGURES = ("eval loss", "perplexity", "accuracy", "reward", "kl")  # of the stage's own run
SHARES = ("accuracy", "acceptance", "forgetting")  # may be written in per cent, as may every suite
GATE_GRAMMAR = (
    'A gate is "FIGURE >= NUMBER" (or >, <=, <; shares also in per cent: "acceptance >= 80 %"), "FIGURE fell" or "FIGURE rose". '
    "Figures: eval loss, perplexity, accuracy (of pairs), reward, kl, acceptance (the first suite), the name of any suite, "
    "forgetting (change of the bits per byte of the general text against the base)."
)
_GATE = re.compile(
    r"(?P<figure>[^<>=%]+?)\s*(?:(?P<sign>>=|<=|>|<)\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<percent>%)?|\s(?P<way>fell|rose))"
)


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on a stage's result, as written in `text`; `sign` is >=, >, <=, <, fell or rose."""

    text: str
    figure: str
    sign: str
    number: float | None = None

    def passes(self, before: float | None, after: float | None) -> bool:
        """Whether the figure satisfies it; a figure that was not measured satisfies nothing."""
        bound = before if self.number is None else self.number
        if after is None or bound is None:
            return False
        outcomes = {">=": after >= bound, ">": after > bound, "<=": after <= bound, "<": after < bound}
        return (outcomes | {"fell": after < bound, "rose": after > bound})[self.sign]

    def found(self, before: float | None, after: float | None) -> str:
        """What was measured, in words."""
        if after is None:
            return f"{self.figure} was not measured"
        if self.number is not None:
            return f"{self.figure} is {self._shown(after)}"
        if before is None:
            return f"{self.figure} was measured only once ({self._shown(after)}), which shows no change"
        return f"{self.figure} went from {self._shown(before)} to {self._shown(after)}"

    def _shown(self, value: float) -> str:
        """Shares in per cent: those of suites, and whatever `SHARES` names."""
        is_share = self.figure in SHARES or self.figure not in EVAL_FIGURES
        return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def parse_gate(text: str, where: str = "gate") -> Gate:
    """Read a gate strictly. Raises `ConfigError` with the grammar."""
    match = _GATE.fullmatch(" ".join(text.split()))
    if match is None:
        raise _bad_gate(f"{text[:80]!r} is no gate.", where)
    figure, number = match["figure"].strip(), match["number"]
    value = None if number is None else float(number)
    if match["percent"] is not None and value is not None:
        if figure in EVAL_FIGURES and figure not in SHARES:
            raise _bad_gate(f"{figure} in {text[:80]!r} is no share: it has no per cent.", where)
        value /= 100
    return Gate(text, figure, match["sign"] or match["way"], value)


def _bad_gate(problem: str, where: str) -> ConfigError:
    return ConfigError("CONFIG_INVALID_VALUE", problem, where=where, remedy=GATE_GRAMMAR)


def check_gates(gates: Iterable[Gate], suites: Sequence[str], *, objective: str, has_text: bool, where: str) -> None:
    """Every figure of a gate must be one that will be measured. `has_text`: whether forgetting is."""
    supervised = objective in ("sft", "pretrain")
    for gate in gates:
        shown = f"{gate.text[:80]!r}"
        if gate.figure in ("accuracy", "acceptance", *suites) and gate.number is not None and not 0 <= gate.number <= 1:
            raise _bad_gate(f"{gate.figure} in {shown} is a share, from 0 to 1 or from 0 to 100 %.", where)
        if gate.figure in EVAL_FIGURES:
            if gate.figure in (("accuracy", "reward", "kl") if supervised else ("perplexity",)):
                raise _bad_gate(f"{shown} cannot be decided: {objective} has no {gate.figure}.", where)
            continue
        if gate.figure not in (known := ("acceptance", "forgetting", *suites)):
            near = difflib.get_close_matches(gate.figure, [*EVAL_FIGURES, *known], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise _bad_gate(f"{gate.figure!r} in {shown} is no figure{hint}", where)
        if objective == "reward":
            raise _bad_gate(f"{shown} cannot be decided: a reward model gives no answers to measure.", where)
        if gate.figure == "forgetting" and not has_text:
            raise _bad_gate(f"{shown} needs measure.general_text.", where)
        if gate.figure == "acceptance" and not suites:
            raise _bad_gate(f"{shown} needs a suite in measure.suites.", where)
