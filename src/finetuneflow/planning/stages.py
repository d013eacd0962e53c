"""The plan of a pipeline: every stage as a run of its own, and what they take together.

A stage whose base does not exist yet is planned on the shape of the model the pipeline starts from: tuning does not change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetuneflow.config import RunConfig
from finetuneflow.knowledge.cost import Cost
from finetuneflow.knowledge.lint import check
from finetuneflow.knowledge.situation import Finding
from finetuneflow.pipeline_config import Pipeline
from finetuneflow.pipeline_stages import STAGE_PREFIX, Stage
from finetuneflow.planning import Look, look

TUNE_FIRST = "PREFERENCE_BEFORE_TUNING"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage, looked at like a run about to start."""

    stage: Stage
    seen: Look

    @property
    def cost(self) -> Cost | None:
        return self.seen.cost_with()

    def findings(self) -> list[Finding]:
        """What the linter says. That a model should be tuned before it learns preferences is known not to hold behind a stage."""
        found = check(self.seen.situation)
        return [finding for finding in found if not (self.stage.start.parent and finding.code == TUNE_FIRST)]

    def to_dict(self) -> dict[str, Any]:
        situation, cost = self.seen.situation, self.cost
        estimate = situation.estimate
        return {
            "stage": self.stage.name,
            "objective": self.stage.config.training.objective,
            "method": self.stage.config.method.kind,
            "start": {"kind": self.stage.start.kind, "from": self.stage.start.parent, "reason": self.stage.start.reason},
            "examples": situation.data.examples if situation.data else None,
            "steps": situation.steps,
            "memory_bytes": estimate.total_bytes if estimate else None,
            "capacity_bytes": estimate.capacity_bytes if estimate else None,
            "verdict": estimate.verdict if estimate else None,
            "seconds": cost.seconds.expected if cost else None,
            "price_usd": cost.price_usd if cost else None,
            "energy_kwh": cost.energy_kwh if cost else None,
            "notes": list(self.seen.notes),
        }


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    name: str
    stages: tuple[StagePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every stage, and `total`: times, prices and energy add up, memory is that of the stage that needs most.

        A sum is None where a part of it is not known.
        """
        rows = [plan.to_dict() for plan in self.stages]
        memory = [row["memory_bytes"] for row in rows]
        total: dict[str, Any] = {
            "memory_bytes": None if None in memory else max(memory),
            **{key: _sum([row[key] for row in rows]) for key in ("steps", "seconds", "price_usd", "energy_kwh")},
        }
        return {"pipeline": self.name, "stages": rows, "total": total}


def _sum(values: list[Any]) -> Any:
    return None if None in values else sum(values)


def _as_planned(stage: Stage) -> RunConfig:
    """The stage's settings with the adapter it will start from, by name alone: what is held in memory depends on there being one."""
    config, start = stage.config, stage.start
    if start.kind not in ("continue", "merge", "stack"):
        return config
    model = config.model.model_copy(update={"adapter": f"{STAGE_PREFIX}{start.parent}", "adapter_start": start.kind})
    return config.model_copy(update={"model": model})


def plan_stages(pipeline: Pipeline, **where: Any) -> PipelinePlan:
    """Look at every stage. `where`: as for `look` (workspace, gpu, count, network)."""
    return PipelinePlan(
        pipeline.name, tuple(StagePlan(stage, look(_as_planned(stage), stage.origins, **where)) for stage in pipeline.stages)
    )
