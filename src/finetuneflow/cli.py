"""`ftf`: one short function per verb. Heavy imports happen inside the verbs, so that `--help` is instant.

Exit codes: 0 done, 1 unexpected, 2 configuration or usage, 3 data, 4 model, 5 hardware, 6 training,
7 resume, 8 evaluation, 9 export, 10 storage, 130 interrupted. With `--json` every verb prints one JSON
document on standard output (streams: one object per line), errors included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuneflow.errors import CODES, ConfigError, FineTuneFlowError
from finetuneflow.workspace import Workspace

if TYPE_CHECKING:
    from finetuneflow.config import Origin, RunConfig
    from finetuneflow.events import Event
    from finetuneflow.training.run import RunResult

app = typer.Typer(
    name="ftf",
    help="From a dataset to a fine-tuned language model that is shown to be better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at, check and convert datasets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
WorkspaceDir = Annotated[Path | None, typer.Option("--workspace", help="Data directory. [default: $FTF_HOME or ./ftf-workspace]", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only errors.")]
Run = Annotated[str, typer.Argument(help="A run's name, a unique beginning of it, its folder, or `latest`.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]


# --- data -----------------------------------------------------------------------------------------


# --- training ---------------------------------------------------------------------------------------


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run file (YAML). `ftf config` prints one to start from.")],
    set_: Set = None,
    workspace: WorkspaceDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the run file and the data, then stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model as a run file says."""
    from finetuneflow.config import load_config, require_runnable

    settings, origins = load_config(config, set_)
    require_runnable(settings, where=str(config))
    if dry_run:
        _dry_run(settings, Workspace(workspace), as_json=as_json)
        return
    run_config(settings, origins, Workspace(workspace), as_json=as_json, quiet=quiet)


def run_config(settings: RunConfig, origins: dict[str, Origin], workspace: Workspace, *, as_json: bool, quiet: bool) -> RunResult:
    """Train with the view the options ask for."""
    from finetuneflow.training.run import train as train_run

    _quieten_libraries()
    with _view(as_json=as_json, quiet=quiet) as view:
        result = train_run(settings, workspace=workspace, origins=origins, sinks=[view])
    _print_result(result, as_json=as_json, quiet=quiet)
    return result


@app.command()
def resume(
    run: Run = "latest",
    workspace: WorkspaceDir = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although configuration, data, tokenizer or code changed; each change is recorded.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted or stopped run from its newest intact checkpoint."""
    from finetuneflow.training.run import resume as resume_run

    place = Workspace(workspace)
    _quieten_libraries()
    with _view(as_json=as_json, quiet=quiet) as view:
        result = resume_run(place.run_dir(run), workspace=place, sinks=[view], accept_changes=accept_changes)
    _print_result(result, as_json=as_json, quiet=quiet)


@app.command()
def stop(
    run: Run = "latest",
    discard: Annotated[bool, typer.Option("--discard", help="Stop without saving a checkpoint.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the run to end.", min=0)] = 60.0,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Stop a running run after its current step; it can be resumed."""
    from finetuneflow.terminal import console, print_json
    from finetuneflow.training.status import request_stop, run_status

    run_dir = Workspace(workspace).run_dir(run)
    before = run_status(run_dir)
    if before == "running":
        request_stop(run_dir, save=not discard)
        deadline = time.monotonic() + wait
        while run_status(run_dir) == "running" and time.monotonic() < deadline:
            time.sleep(0.2)
    after = run_status(run_dir)
    if as_json:
        print_json({"run": run_dir.name, "before": before, "status": after})
    elif before != "running":
        console.print(f"{run_dir.name} is not running ({before}).")
    else:
        console.print(f"{run_dir.name}: {'stopping after its current step' if after == 'running' else after}.")


@app.command()
def runs(workspace: WorkspaceDir = None, as_json: Json = False) -> None:
    """List all runs, newest last."""
    from finetuneflow.terminal import console, human_time, print_json, table
    from finetuneflow.training.status import run_summary

    place = Workspace(workspace)
    summaries = [run_summary(place.runs_dir / name) for name in place.run_names()]
    if as_json:
        print_json(summaries)
        return
    if not summaries:
        console.print(f"No runs in {place.runs_dir} yet. Start one with `ftf train run.yaml`, or try `ftf demo`.")
        return
    rows = [
        (
            s["run"],
            s["status"],
            s["method"],
            s["base"],
            f"{s['step']}/{s['total_steps']}" if s["total_steps"] else "",
            _number(s["loss"]),
            _number(s["eval_loss"]),
            human_time(s["seconds"]) if s["seconds"] else "",
        )
        for s in summaries
    ]
    console.print(table(None, ["run", "status", "method", "base", "step", "loss", "eval loss", "time"], rows, right=(4, 5, 6, 7)))


@app.command()
def logs(
    run: Run = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new lines until the run ends.")] = False,
    level: Annotated[str, typer.Option(help="What to show: all, or only warning lines.")] = "all",
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Show what a run has reported."""
    from finetuneflow.events import read_events
    from finetuneflow.terminal import RunView, console, print_json_line
    from finetuneflow.training.status import run_status

    run_dir = Workspace(workspace).run_dir(run)
    view = RunView(console, live=False)
    show = print_json_line if as_json else view
    seen = 0
    while True:
        alive = run_status(run_dir) == "running"
        for event in read_events(run_dir / "events.jsonl", after=seen):
            seen = event["seq"]
            if level != "warning" or event["event"] in ("warning", "failed"):
                show(event)
        if not follow or not alive:
            return
        time.sleep(0.3)


@app.command(name="verify-resume")
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
    from finetuneflow.terminal import console, error_console, print_json
    from finetuneflow.training.verify import verify_resume as verify

    settings, _ = load_config(config, set_)
    require_runnable(settings, where=str(config))
    result = verify(settings, Workspace(workspace), kills=kills, seed=seed, say=lambda text: error_console.print(f"  {text}", style="dim"))
    if as_json:
        print_json(result.to_dict())
    else:
        for kill in result.kills:
            console.print(f"killed with SIGKILL {kill.moment}, step {kill.step}")
        console.print(f"weights: {result.tensors} tensors compared, {len(result.different_tensors)} differ")
        console.print(f"log and evaluation lines: {result.log_lines} compared, {len(result.different_lines)} differ")
        for difference in (*result.different_tensors, *result.different_lines)[:10]:
            console.print(f"  differs: {difference}", markup=False)
        console.print("[bold green]exact[/]" if result.equal else "[bold red]not exact[/]")
    if not result.equal:
        raise typer.Exit(7)


@app.command()
def config(as_json: Json = False) -> None:
    """Print a run file with every setting, its default and its meaning."""
    from finetuneflow.config import settings
    from finetuneflow.terminal import print_json

    listed = list(settings())
    if as_json:
        print_json([{"setting": key, "default": default, "description": text} for key, _, default, text in listed])
        return
    section = ""
    for key, _, default, text in listed:
        group, _, name = key.rpartition(".")
        if group != section:
            section = group
            sys.stdout.write(f"{group}:\n")
        indent = "  " if group else ""
        sys.stdout.write(f"{indent}# {text}\n{indent}{name}: {json.dumps(default)}\n")


@app.command()
def explain(code: Annotated[str, typer.Argument(help="An error code, such as OUT_OF_MEMORY.")], as_json: Json = False) -> None:
    """Say what an error code means."""
    import difflib

    from finetuneflow.terminal import console, print_json

    wanted = code.strip().upper()
    if wanted not in CODES:
        near = ", ".join(difflib.get_close_matches(wanted, CODES, n=3, cutoff=0.4))
        raise ConfigError("CONFIG_INVALID_VALUE", f"There is no error code {wanted[:60]!r}.", remedy=f"Near it: {near}." if near else None)
    if as_json:
        print_json({"code": wanted, "meaning": CODES[wanted]})
    else:
        console.print(f"{wanted}: {CODES[wanted]}", markup=False)


# --- shared ---------------------------------------------------------------------------------------


def _view(*, as_json: bool, quiet: bool) -> Any:
    from finetuneflow.terminal import RunView, error_console

    return RunView(error_console if as_json else None, quiet=quiet or as_json)


def _print_result(result: RunResult, *, as_json: bool, quiet: bool) -> None:
    from finetuneflow.terminal import console, print_json

    if as_json:
        curves = ("train_loss_curve", "eval_loss_curve", "inference_samples")
        print_json({"run": result.run_dir.name, "path": str(result.run_dir), "status": result.status, "metrics": {k: v for k, v in result.metrics.items() if k not in curves}})
    elif not quiet and result.status == "succeeded":
        console.print(f"Next: ftf chat {result.run_dir.name}   ftf evaluate {result.run_dir.name}   ftf export {result.run_dir.name} --to adapter", style="dim")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _quieten_libraries() -> None:
    """Library chatter (progress bars of loading, advice about tokenizers) has no place between our lines."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point: translates every error of ours into text (or JSON) and an exit code, once."""
    as_json = "--json" in sys.argv
    try:
        app()
    except FineTuneFlowError as error:
        from finetuneflow.terminal import print_error

        print_error(error, as_json=as_json)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `ftf … | head`
        sys.stderr.close()
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
