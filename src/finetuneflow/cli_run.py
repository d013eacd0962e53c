"""The verbs of runs and pipelines: train, resume, stop, runs, logs, verify-resume. `cli.py` registers them; heavy imports happen inside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finetuneflow.cli_options import Json, Quiet, RunOrPipeline, Set, WorkspaceDir
from finetuneflow.cli_plan import RecipeOption, read_settings
from finetuneflow.errors import ConfigError, FineTuneFlowError, TrainingError
from finetuneflow.workspace import Workspace

if TYPE_CHECKING:
    from finetuneflow.config import Origin, RunConfig
    from finetuneflow.events import Event
    from finetuneflow.pipeline_config import Pipeline
    from finetuneflow.training.pipeline import PipelineResult
    from finetuneflow.training.run import RunResult

RUN_FIGURES_WIDTH = 62  # of the columns of `ftf runs` between a run's name and its base, gaps included


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="The run file (YAML); `ftf config` prints one to start from. A file with `stages` is a pipeline.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    set_: Set = None,
    workspace: WorkspaceDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the run file and the data, then stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model as a run file, a recipe, or both say: one run, or the stages of a pipeline."""
    from finetuneflow.config import require_runnable
    from finetuneflow.pipeline_config import load_pipeline, names_pipeline
    from finetuneflow.terminal import print_json

    if config is None and recipe is None:
        raise ConfigError(
            "CLI_USAGE", "There is nothing to train: name a run file or a recipe.", remedy="See `ftf recipes` and `ftf config`."
        )
    if names_pipeline(config, recipe):
        pipeline = load_pipeline(config, set_, recipe=recipe)
        if dry_run:
            _dry_run_pipeline(pipeline, Workspace(workspace), as_json=as_json)
        else:
            _train_pipeline(pipeline, Workspace(workspace), as_json=as_json, quiet=quiet)
        return
    settings, origins = read_settings(config, recipe, set_)
    require_runnable(settings, where=str(config or recipe))
    if dry_run:
        manifest = _dry_run(_checked(settings, Workspace(workspace)), Workspace(workspace), quiet=as_json)
        if as_json:
            print_json(manifest)
        return
    run_config(settings, origins, Workspace(workspace), as_json=as_json, quiet=quiet)


def run_config(settings: RunConfig, origins: dict[str, Origin], workspace: Workspace, *, as_json: bool, quiet: bool) -> RunResult:
    """Train with the view the options ask for."""
    from finetuneflow.training.run import train as train_run

    with _view(as_json=as_json, quiet=quiet) as view:
        result = train_run(settings, workspace=workspace, origins=origins, sinks=[view])
    _print_result(result, as_json=as_json, quiet=quiet)
    return result


def _train_pipeline(pipeline: Pipeline, workspace: Workspace, *, as_json: bool, quiet: bool) -> None:
    from finetuneflow.training.pipeline import train_pipeline

    with _view(as_json=as_json, quiet=quiet) as view, _table_at_a_gate(workspace, shown=not (as_json or quiet)):
        result = train_pipeline(pipeline, workspace=workspace, sinks=[view])
    _print_pipeline(result, as_json=as_json, quiet=quiet)


@contextlib.contextmanager
def _table_at_a_gate(workspace: Workspace, *, shown: bool) -> Iterator[None]:
    """Where a gate stops a pipeline, what was found until there comes before the error."""
    from finetuneflow.export.pipeline_report import read_pipeline_record
    from finetuneflow.views_pipeline import show_pipeline

    try:
        yield
    except TrainingError as error:
        if shown and error.code == "PIPELINE_GATE":
            show_pipeline(read_pipeline_record(workspace.pipelines_dir / error.context["pipeline"]))
        raise


def resume(
    run: RunOrPipeline = "latest",
    workspace: WorkspaceDir = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Go on although configuration, data, tokenizer or code changed; each change is recorded."
        ),
    ] = False,
    accept_gate: Annotated[
        bool, typer.Option("--accept-gate", help="Of a pipeline: go on behind the gate it stands at; that is recorded.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted or stopped run from its newest intact checkpoint, or a pipeline at the stage it had reached."""
    from finetuneflow.training.run import resume as resume_run
    from finetuneflow.training.status import pipeline_dir

    place = Workspace(workspace)
    if (directory := pipeline_dir(place, run)) is not None:
        from finetuneflow.training.pipeline import resume_pipeline

        shown = not (as_json or quiet)
        with _view(as_json=as_json, quiet=quiet) as view, _table_at_a_gate(place, shown=shown):
            resumed = resume_pipeline(
                directory, workspace=place, sinks=[view], accept_changes=accept_changes, accept_gate=accept_gate
            )
        _print_pipeline(resumed, as_json=as_json, quiet=quiet)
        return
    if accept_gate:
        raise ConfigError(
            "CLI_USAGE", f"--accept-gate is for pipelines, and {run!r} is none.", remedy="`ftf runs` lists pipelines too."
        )
    with _view(as_json=as_json, quiet=quiet) as view:
        result = resume_run(place.run_dir(run), workspace=place, sinks=[view], accept_changes=accept_changes)
    _print_result(result, as_json=as_json, quiet=quiet)


def stop(
    run: RunOrPipeline = "latest",
    discard: Annotated[bool, typer.Option("--discard", help="Stop without saving a checkpoint.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the run to end.", min=0)] = 60.0,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Stop a running run, or pipeline, after its current step; it can be resumed."""
    from finetuneflow.terminal import print_json, say
    from finetuneflow.training.status import pipeline_dir, pipeline_status, request_stop, run_status, stage_runs

    place = Workspace(workspace)
    found, kind = pipeline_dir(place, run), "pipeline"
    if found is None or (run == "latest" and pipeline_status(found) != "running"):
        found, kind = place.run_dir(run), "run"
    status = pipeline_status if kind == "pipeline" else run_status
    before = status(found)
    if before == "running":
        request_stop(found, save=not discard)
        for run_dir in stage_runs(found).values() if kind == "pipeline" else ():
            if run_status(run_dir) == "running":
                request_stop(run_dir, save=not discard)
        deadline = time.monotonic() + wait
        while status(found) == "running" and time.monotonic() < deadline:
            time.sleep(0.2)
    after = status(found)
    if as_json:
        print_json({kind: found.name, "before": before, "status": after})
    elif before != "running":
        say(f"{found.name} is not running ({before}).")
    else:
        say(f"{found.name}: {'stopping after its current step' if after == 'running' else after}.")


def runs(
    pipelines: Annotated[bool, typer.Option("--pipelines", help="List pipelines instead.")] = False,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """List all runs, newest last, and the pipelines they belong to."""
    from finetuneflow.terminal import console, human_time, print_json, say, shorten_middle, table
    from finetuneflow.training.status import run_summary

    place = Workspace(workspace)
    if pipelines:
        _list_pipelines(place, as_json=as_json)
        return
    summaries = [run_summary(place.runs_dir / name) for name in place.run_names()]
    if as_json:
        print_json(summaries)
        return
    if not summaries:
        say(f"No runs in {place.runs_dir} yet. Start one with `ftf train run.yaml`, or try `ftf demo`.")
        return
    columns = ["run", "status", "method", "step", "loss", "eval loss", "time", "base"]
    room = console.width - max(len(s["run"]) for s in summaries) - RUN_FIGURES_WIDTH
    shown = columns if room >= 12 else columns[:-1]  # a narrow screen shows the figures first
    rows = [
        (
            s["run"],
            s["status"],
            s["method"],
            f"{s['step']}/{s['total_steps']}" if s["total_steps"] else "",
            _number(s["loss"]),
            _number(s["eval_loss"]),
            human_time(s["seconds"]) if s["seconds"] else "",
            shorten_middle(s["base"] or "", max(12, min(40, room))),
        )[: len(shown)]
        for s in summaries
    ]
    console.print(table(None, shown, rows, right=(3, 4, 5, 6), whole=range(len(shown))))
    if place.pipeline_names():
        console.print()
        _list_pipelines(place, as_json=False)


def _list_pipelines(place: Workspace, *, as_json: bool) -> None:
    from finetuneflow.terminal import print_json, say
    from finetuneflow.training.status import pipeline_summary, runs_of_pipelines
    from finetuneflow.views_pipeline import show_pipelines

    found, runs = [], runs_of_pipelines(place)
    for name in place.pipeline_names():
        try:
            found.append(pipeline_summary(place.pipelines_dir / name, runs=runs.get(name, {})))
        except (FineTuneFlowError, AttributeError, KeyError, TypeError, ValueError) as error:
            # A damaged file, or an event that nobody here wrote: listed as such, never hidden, and the others with it.
            path, reason = (
                str(place.pipelines_dir / name),
                str(getattr(error, "message", f"its records cannot be read: {error!r}")),
            )
            found.append({"pipeline": name, "path": path, "status": "damaged", "reason": reason, "seconds": None, "stages": []})
    if as_json:
        print_json(found)
    elif found:
        show_pipelines(found)
    else:
        say(f"No pipelines in {place.pipelines_dir} yet. `ftf train` starts one from a file with `stages`.")


def logs(
    run: RunOrPipeline = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new lines until the run ends.")] = False,
    level: Annotated[Literal["all", "warning"], typer.Option(help="What to show: all, or only warning lines.")] = "all",
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Show what a run, or a pipeline, has reported."""
    from finetuneflow.events import read_events
    from finetuneflow.terminal import RunView, console, print_json_line
    from finetuneflow.training.status import pipeline_dir, pipeline_status, run_status

    place = Workspace(workspace)
    directory = None if run == "latest" else pipeline_dir(place, run)
    found = directory or place.run_dir(run)
    status = pipeline_status if directory else run_status
    view = RunView(console, live=False)
    show = print_json_line if as_json else view
    seen = 0
    while True:
        alive = status(found) == "running"
        for event in read_events(found / "events.jsonl", after=seen):
            seen = event["seq"]
            if level != "warning" or event["event"] in ("warning", "failed"):
                show(event)
        if not follow or not alive:
            return
        time.sleep(0.3)


def verify_resume(
    config: Annotated[Path, typer.Argument(help="The run file to prove it with; make it a short one.")],
    set_: Set = None,
    kills: Annotated[int, typer.Option(help="How often the second run is killed.", min=1, max=20)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Prove that a killed and resumed run ends exactly like an uninterrupted one."""
    from finetuneflow.config import load_config, require_runnable
    from finetuneflow.knowledge.situation import many
    from finetuneflow.terminal import console, error_console, print_json, say
    from finetuneflow.training.verify import verify_resume as verify

    def tell(text: str) -> None:
        error_console.print(f"  {text}", style="dim", markup=False)

    settings, _ = load_config(config, set_)
    require_runnable(settings, where=str(config))
    result = verify(settings, Workspace(workspace), kills=kills, seed=seed, say=tell)
    if as_json:
        print_json(result.to_dict())
    else:
        for kill in result.kills:
            say(f"killed with SIGKILL {kill.moment}, step {kill.step}")
        say(f"weights: {many(result.tensors, 'tensor')} compared, {len(result.different_tensors)} differ")
        say(f"log and evaluation lines: {result.log_lines} compared, {len(result.different_lines)} differ")
        for difference in (*result.different_tensors, *result.different_lines)[:10]:
            say(f"  differs: {difference}")
        console.print("[bold green]exact[/]" if result.equal else "[bold red]not exact[/]")
    if not result.equal:
        raise typer.Exit(7)


# --- shared ---------------------------------------------------------------------------------------


def _checked(settings: RunConfig, workspace: Workspace) -> RunConfig:
    """The settings, once what they name beside the data is known to be there: an adapter, rewards, an acceptance suite."""
    from finetuneflow.training.objectives import require_named
    from finetuneflow.training.start import with_folders

    settings = with_folders(settings.with_absolute_paths(), workspace)
    require_named(settings)
    return settings


def _dry_run(settings: RunConfig, workspace: Workspace, *, quiet: bool) -> dict[str, Any]:
    """Everything up to the tokens: what would be trained on, or why it cannot be."""
    from finetuneflow.terminal import RunView, say
    from finetuneflow.training.objectives import load_materials
    from finetuneflow.views import dry_run_text

    view = RunView(quiet=quiet)
    events = iter(range(1, 1_000_000))

    def emit(name: str, /, **fields: Any) -> Event:
        event = {"seq": next(events), "event": name, **fields}
        view(event)
        return event

    manifest = load_materials(settings, workspace, emit).prepared.manifest
    if not quiet:
        say(dry_run_text(manifest))
    return manifest


def _dry_run_pipeline(pipeline: Pipeline, workspace: Workspace, *, as_json: bool) -> None:
    """Every stage up to its tokens, with the base's tokenizer, which tuning does not change."""
    from finetuneflow.terminal import print_json, say
    from finetuneflow.training.pipeline import checked

    found = {}
    for stage in checked(pipeline, workspace).stages:
        if not as_json:
            say(f"{stage.name} ({stage.config.training.objective}): {stage.start.reason}", style="bold")
        found[stage.name] = _dry_run(stage.config, workspace, quiet=as_json)
    if as_json:
        print_json({"pipeline": pipeline.name, "stages": found})


def _view(*, as_json: bool, quiet: bool) -> Any:
    from finetuneflow.terminal import RunView, error_console

    return RunView(error_console if as_json else None, quiet=quiet or as_json)


def _print_result(result: RunResult, *, as_json: bool, quiet: bool) -> None:
    from finetuneflow.terminal import print_json, say

    if as_json:
        curves = ("train_loss_curve", "eval_loss_curve", "metrics_curve", "inference_samples")
        print_json(
            {
                "run": result.run_dir.name,
                "path": str(result.run_dir),
                "status": result.status,
                "metrics": {k: v for k, v in result.metrics.items() if k not in curves},
            }
        )
    elif not quiet and result.status == "succeeded":
        name = result.run_dir.name
        target = "adapter" if (result.run_dir / "adapter").is_dir() else "merged"
        verbs = [f"ftf evaluate {name}", f"ftf export {name} --to {target}"]
        if result.metrics["objective"] != "reward":  # which answers nobody
            verbs.insert(0, f"ftf chat {name}")
        say("Next:  " + "\n       ".join(verbs), style="dim")
    if result.status == "stopped":  # `ftf train … && ftf export …` must not go on with half a run
        raise typer.Exit(130)


def _print_pipeline(result: PipelineResult, *, as_json: bool, quiet: bool) -> None:
    from finetuneflow.export.pipeline_report import read_pipeline_record
    from finetuneflow.terminal import print_json, say
    from finetuneflow.views_pipeline import show_pipeline

    record = read_pipeline_record(result.directory)
    if as_json:
        print_json(record.to_dict())
    elif not quiet:
        show_pipeline(record)
        if result.status == "succeeded":
            name = result.directory.name
            say(
                f"Report: {result.directory / 'report.md'}\nNext:  ftf chat {name}\n       ftf export {name} --to adapter",
                style="dim",
            )
    if result.status == "stopped":
        raise typer.Exit(130)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
