"""What a pipeline measures of each stage's result, and what its gates are decided by.

measure_model   suites and general text of one model, as `evals/<stage>.json` keeps them
gate_figures    (before, after) of the figure that a gate asks for
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetuneflow.config import BUNDLED_SUITES
from finetuneflow.errors import EvaluationError
from finetuneflow.events import metric_lines
from finetuneflow.pipeline_config import BASE, BUNDLED, Pipeline, suite_label
from finetuneflow.pipeline_gates import EVAL_FIGURES, Gate
from finetuneflow.pipeline_stages import Stage
from finetuneflow.training.status import sound_events
from finetuneflow.workspace import read_json_object


def read_measures(pipeline: Pipeline) -> None:
    """A mistake in a suite, a judge or the general text must show before anything is trained."""
    from finetuneflow.evaluation.judges import BUILT_IN, load_judges
    from finetuneflow.evaluation.suite import load_suite, require_judges

    measure = pipeline.measure
    if measure is None:
        return
    judges = load_judges(Path(measure.judges)) if measure.judges else {}
    for path in measure.suites:
        require_judges(load_suite(path), {**BUILT_IN, **judges})
    if measure.general_text not in (None, BUNDLED):
        _general_text(str(measure.general_text))


def _general_text(text: str) -> Path:
    from finetuneflow.evaluation.compare import GENERAL_TEXT

    path = GENERAL_TEXT if text == BUNDLED else Path(text)
    try:
        if path.read_text(encoding="utf-8").strip():
            return path
        problem = "is empty"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {error}"
    raise EvaluationError(
        "EVALUATION_NO_DATA",
        f"The general text {problem}.",
        where=str(path),
        remedy="Name a UTF-8 text file in measure.general_text.",
    )


def with_kept_measures(pipeline: Pipeline, directory: Path) -> Pipeline:
    """Copy the suites and the general text into the pipeline, so that every stage is measured with the same."""
    measure = pipeline.measure
    if measure is None:
        return pipeline
    folder = directory / "measure"
    folder.mkdir()
    suites = []
    for number, path in enumerate(measure.suites, 1):
        if path not in BUNDLED_SUITES:
            target = folder / f"suite-{number}.yaml"
            shutil.copyfile(path, target)
            path = str(target.resolve())
        suites.append(path)
    changed: dict[str, Any] = {"suites": suites}
    if measure.general_text not in (None, BUNDLED):
        shutil.copyfile(str(measure.general_text), folder / "general.txt")
        changed["general_text"] = str((folder / "general.txt").resolve())
    if measure.judges:
        shutil.copyfile(measure.judges, folder / "judges.py")
        changed["judges"] = str((folder / "judges.py").resolve())
    return replace(pipeline, measure=measure.model_copy(update=changed))


def measure_model(pipeline: Pipeline, label: str, run_dir: Path | None, evals_dir: Path) -> dict[str, Any]:
    """Suites and general text of a stage's result, or of what the first stage starts from (`run_dir` None)."""
    from finetuneflow.evaluation.compare import measure_general
    from finetuneflow.evaluation.judges import load_judges
    from finetuneflow.evaluation.suite import load_suite, run_suite

    measure = pipeline.measure
    assert measure is not None
    generator = _generator(pipeline, run_dir)
    judges = load_judges(Path(measure.judges)) if measure.judges else None
    suites: dict[str, Any] = {}
    for path in measure.suites:
        name = suite_label(path)
        answers = evals_dir / f"{label}.{len(suites) + 1}.answers.jsonl"
        suites[name] = run_suite(generator, load_suite(path), judges=judges, resume_path=answers).to_dict()
    general = asdict(measure_general(generator, _general_text(measure.general_text))) if measure.general_text else None
    return {"stage": label, "run": run_dir.name if run_dir else None, "suites": suites, "general": general}


def _generator(pipeline: Pipeline, run_dir: Path | None) -> Any:
    from finetuneflow.inference import load_generator

    if run_dir is not None:
        return load_generator(run_dir)
    config = pipeline.stages[0].config
    model = config.model
    # A base is asked through the template its stage trains with: else the form of the question would be a part of the gain.
    options: dict[str, Any] = {"revision": model.revision, "module": model.module, "template": config.data.template}
    return load_generator(model.adapter or model.base, **options)


# --- gates -----------------------------------------------------------------------------------------------


def gate_figures(
    directory: Path, pipeline: Pipeline, stage: Stage, gate: Gate, run_dir: Path
) -> tuple[float | None, float | None]:
    """(before, after) of a gate's figure.

    Of an evaluation: the first one of the stage's run, and that of the weights it kept; of what is measured: the model the
    stage started from, and its result.
    """
    if gate.figure in EVAL_FIGURES:
        return _eval_figures(run_dir, gate.figure)
    start = stage.start.parent or BASE
    before, after = (read_json_object(directory / "evals" / f"{label}.json") for label in (start, stage.name))
    if gate.figure == "forgetting":
        base = _bits(read_json_object(directory / "evals" / f"{BASE}.json"))
        return tuple(None if base is None or bits is None else bits / base - 1 for bits in map(_bits, (before, after)))  # type: ignore[return-value]
    name = gate.figure
    if name == "acceptance" and pipeline.measure is not None:
        name = suite_label(pipeline.measure.suites[0])
    return _share(before, name), _share(after, name)


def _eval_figures(run_dir: Path, figure: str) -> tuple[float | None, float | None]:
    key = "eval_" + figure.removeprefix("eval ")
    metrics = read_json_object(run_dir / "metrics.json")
    lines = [line[key] for line in metric_lines(run_dir / "events.jsonl", "eval") if key in line]
    after = metrics.get("eval_metrics", {}).get(key)
    if after is None:  # not evaluated: what the last log line says
        logged = [line["metrics"] for line in metric_lines(run_dir / "events.jsonl") if "metrics" in line]
        lines = [found[figure] for found in logged if figure in found]
        after = lines[-1] if lines else None
    return (lines[0] if len(lines) > 1 else None), after


def _bits(found: dict[str, Any]) -> float | None:
    return (found.get("general") or {}).get("bits_per_byte")


def _share(found: dict[str, Any], suite: str) -> float | None:
    return found.get("suites", {}).get(suite, {}).get("pass_share")


def accepted_gates(directory: Path, stage: str) -> set[str]:
    """Gates of a stage that somebody accepted in an earlier attempt."""
    return {
        event["gate"]
        for event in sound_events(directory)
        if event["event"] == "gate" and event["stage"] == stage and event["accepted"]
    }
