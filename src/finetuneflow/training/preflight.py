"""Before a run: predict it, look over its settings, and refuse what cannot fit. Leaves `plan.json` in the run directory.

The prediction is advice: where it cannot be made, the run goes on with a warning. Only a run that is predicted to need
clearly more memory than there is does not start (`training.memory_check`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuneflow.config import Origin, RunConfig
from finetuneflow.errors import FineTuneFlowError, HardwareError
from finetuneflow.events import Emit
from finetuneflow.knowledge.lint import check
from finetuneflow.knowledge.situation import Situation
from finetuneflow.planning import Look, diagnose_failure, look, machine_here
from finetuneflow.training.setup import Setup
from finetuneflow.workspace import Workspace, write_json

# An estimate is within 15 % in nine of ten cases: a run is refused only where it would not fit even if 15 % too high.
REFUSAL_MARGIN = 1.15
# The data room counts these exactly and warns of them itself a moment later: once is enough. plan.json keeps the estimates.
COUNTED_LATER = frozenset({"ANSWERS_TRUNCATED", "EVAL_OVERLAPS_TRAINING", "KTO_LABELS_UNBALANCED", "PAIR_LENGTH_BIAS"})


def preflight(
    config: RunConfig, origins: Mapping[str, Origin], setup: Setup, run_dir: Path, workspace: Workspace, emit: Emit
) -> None:
    """Write `plan.json`, say plan and findings as events. Raises `MEMORY_WONT_FIT`."""
    try:
        seen = look(
            config, origins, workspace=workspace, machine=machine_here(device=setup.device), network=False, threads=setup.threads
        )
        plan = plan_record(seen)
    except Exception as error:
        # What is wrong with data or model is said by their own stages, with more care than a sample allows; a mistake of
        # ours in the advice is no reason to keep somebody from training.
        reason = error.message if isinstance(error, FineTuneFlowError) else f"{type(error).__name__}: {error}"
        emit("warning", code="PLAN_FAILED", message=f"No prediction could be made: {reason}", advice="")
        return
    write_json(run_dir / "plan.json", plan)
    emit(
        "plan",
        **{key: plan[key] for key in ("device", "memory_bytes", "capacity_bytes", "verdict", "seconds", "steps", "price_usd")},
    )
    for finding in plan["findings"]:
        if finding["code"] not in COUNTED_LATER:
            emit("finding", **finding)
    if config.training.memory_check == "refuse" and (refusal := why_not(seen)) is not None:
        raise refusal


def plan_record(seen: Look) -> dict[str, Any]:
    """What was known before the run, as `plan.json` keeps it; `correction`: what earlier runs had taught by then."""
    situation, estimate = seen.situation, seen.situation.estimate
    cost = seen.cost_with()
    return {
        "device": situation.machine.device.name if situation.machine else None,
        "kind": situation.machine.kind if situation.machine else None,
        "devices": situation.machine.device_count if situation.machine else 0,
        "memory_bytes": estimate.total_bytes if estimate else None,
        "capacity_bytes": estimate.capacity_bytes if estimate else None,
        "verdict": estimate.verdict if estimate else None,
        "seconds": cost.seconds.expected if cost else None,
        # what `train_runtime` measures: the steps, with the evaluations and checkpoints between them
        "training_seconds": sum(cost.parts.get(part, 0.0) for part in ("training", "drawing", "evaluation", "checkpoints"))
        if cost
        else None,
        "compute_dtype": situation.resolved.compute_dtype if situation.resolved else None,
        "steps": situation.steps,
        "price_usd": cost.price_usd if cost else None,
        "memory": estimate.to_dict() if estimate else None,
        "correction": situation.correction,
        "cost": cost.to_dict() if cost else None,
        "findings": [finding.to_dict() for finding in check(situation)],
        "notes": list(seen.notes),
    }


def why_not(seen: Look) -> HardwareError | None:
    """The refusal, with the cheapest change that would fit; None where the run may start."""
    situation, estimate = seen.situation, seen.situation.estimate
    if estimate is None or estimate.total_bytes <= estimate.capacity_bytes * REFUSAL_MARGIN:
        return None
    if situation.config.training.oom == "retry" and situation.config.training.batch_size > 1:
        least = situation.memory_with({"training.batch_size": 1})
        if least is not None and least.fits:
            return None  # halving the micro-batch will get there
    largest = ", ".join(
        f"{name} {size / 1e9:.1f}" for name, size in sorted(estimate.breakdown.items(), key=lambda item: -item[1])[:3]
    )
    device = situation.machine.device.name if situation.machine else "this machine"
    return HardwareError(
        "MEMORY_WONT_FIT",
        f"The run would need about {estimate.total_bytes / 1e9:.1f} GB ({largest}, …), and {device} has {estimate.capacity_bytes / 1e9:.1f} GB.",
        where=f"{estimate.phase}, as predicted",
        remedy=f"{cheapest_fix(situation)} `ftf plan` shows every way that fits; training.memory_check: warn starts it all the same.",
        context={"memory": estimate.to_dict()},
    )


def cheapest_fix(situation: Situation) -> str:
    """The mildest change of settings that is predicted to fit, as a sentence with its options."""
    finding = next((finding for finding in check(situation) if finding.code == "MEMORY_DOES_NOT_FIT" and finding.fix), None)
    if finding is not None:
        after = situation.memory_with(finding.fix)
        needs = f" It is predicted to need {after.total_bytes / 1e9:.1f} GB." if after else ""
        return f"The cheapest change that fits: add {_options(finding.fix)}.{needs}"
    found = diagnose_failure("OUT_OF_MEMORY", "", situation).remedies
    remedy = next((remedy for remedy in found if remedy.enough), found[0] if found else None)
    if remedy is None:
        return "Take a smaller base model."
    return remedy.text + (f" Add {_options(remedy.settings)}." if remedy.settings else "")


def _options(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--set {key}={value}" for key, value in settings.items())


REMEDIES_SHOWN = 4


def memory_remedies(config: RunConfig, workspace: Workspace, failure: FineTuneFlowError, run: str) -> str:
    """What to change after memory ran out, mildest first, with the predicted savings where they can be predicted."""
    batch: dict[str, Any] = {
        key: failure.context[key] for key in ("batch_size", "gradient_accumulation") if key in failure.context
    }
    config = config.model_copy(update={"training": config.training.model_copy(update=batch)})  # after halving, not as configured
    situation = None
    with contextlib.suppress(Exception):  # so soon after running out, anything may fail once more
        situation = look(config, workspace=workspace, network=False).situation
    found = diagnose_failure(failure.code, failure.where or "", situation).remedies
    lines = [
        f"{number}. {remedy.text}"
        + (f" ({', '.join(f'{key}={value}' for key, value in remedy.settings.items())}" if remedy.settings else "")
        + (f"; saves {remedy.saves}" if remedy.saves else "")
        + (")" if remedy.settings else "")
        for number, remedy in enumerate(found[:REMEDIES_SHOWN], 1)
    ]
    return "\n  ".join([*lines, f"`ftf resume` goes on from the last checkpoint; `ftf explain {run}` says more."])
