"""A plan as values: its options, and what becomes of one in a run file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuneflow.config import Origin, RunConfig
from finetuneflow.config import settings as all_settings
from finetuneflow.knowledge.hyperparameters import Quality
from finetuneflow.knowledge.memory import Verdict
from finetuneflow.knowledge.memory_phases import Strategy
from finetuneflow.knowledge.search import with_settings
from finetuneflow.knowledge.variants import kept_settings


@dataclass(frozen=True, slots=True)
class Option:
    """One way to fine-tune at its fastest setting that fits.

    Where nothing fits, memory is that of the setting that needs least, and hours and cost are None. Hours and cost are None too
    where the size of the data is not known. `breakdown`: bytes, on each device. `share_cut`: of the examples, those longer than
    the length chosen, where it is below the wanted one. `startable`: whether the engine can start it today.
    """

    method: str
    name: str
    title: str
    strategy: Strategy
    devices: int
    fits: bool
    verdict: Verdict
    memory_gb: float
    breakdown: dict[str, int]
    hours: float | None
    hours_range: tuple[float, float] | None
    cost_usd: float | None
    energy_kwh: float | None
    co2_kg: float | None
    quality: Quality
    settings: dict[str, Any]
    why: dict[str, str]
    reason: str = ""
    startable: bool = True
    shortened: bool = False
    share_cut: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "name": self.name,
            "title": self.title,
            "strategy": self.strategy,
            "devices": self.devices,
            "fits": self.fits,
            "verdict": self.verdict,
            "memory_gb": self.memory_gb,
            "breakdown": dict(self.breakdown),
            "hours": self.hours,
            "hours_range": list(self.hours_range) if self.hours_range else None,
            "cost": self.cost_usd,
            "energy_kwh": self.energy_kwh,
            "co2_kg": self.co2_kg,
            "quality": self.quality.to_dict(),
            "settings": dict(self.settings),
            "why": dict(self.why),
            "reason": self.reason,
            "startable": self.startable,
            "shortened": self.shortened,
            "share_cut": self.share_cut,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All options and the name of the one to take; None where nothing fits."""

    hardware: dict[str, Any]
    model: dict[str, Any]
    options: tuple[Option, ...]
    choice: str | None
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Option | None:
        return next((option for option in self.options if option.name == self.choice), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "hardware": self.hardware,
            "model": self.model,
            "options": [option.to_dict() for option in self.options],
            "choice": self.choice,
            "notes": list(self.notes),
        }


# --- to a run file ------------------------------------------------------------------------------------

# Settings that no plan changes: the documented defaults and what they are for.
DEFAULT_REASONS = {
    "training.weight_decay": "Documented default.",
    "training.scheduler": "Documented default: the rate falls to zero along a cosine.",
    "training.log_steps": "Documented default.",
    "training.eval_steps": "Documented default.",
    "training.save_steps": "Documented default.",
    "training.keep_checkpoints": "Documented default.",
    "training.load_best": "Documented default: the lowest evaluation loss wins.",
    "training.patience": "Documented default: three evaluations without improvement.",
    "method.dropout": "Documented default.",
}


def to_run_config(
    option: Option, config: RunConfig, *, origins: Mapping[str, Origin] | None = None
) -> tuple[RunConfig, dict[str, Origin], dict[str, str]]:
    """An option as a complete run: the configuration, where each value came from, and the reason for each setting.

    Values that were yours already and stay as they are keep that mark. Data, model and everything the plan has no opinion on
    are taken from `config`.
    """
    planned = RunConfig.model_validate(with_settings(config, option.settings).model_dump())
    before, after = _flat(config), _flat(planned)
    marks: dict[str, Origin] = dict(origins or {key: "yours" for key in kept_settings(config, None)})
    for key in option.settings:
        if not (marks.get(key) in ("yours", "recipe") and before[key] == after[key]):
            marks[key] = "recommended"
    reasons = {}
    for key, _, _, description in all_settings():
        if key in option.why:
            reasons[key] = option.why[key]
        elif marks.get(key) in ("yours", "recipe"):
            reasons[key] = "As you set it." if marks[key] == "yours" else "From the recipe."
        else:
            reasons[key] = DEFAULT_REASONS.get(key, description)
    return planned, marks, reasons


def _flat(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return values
