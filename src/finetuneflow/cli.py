"""`ftf`: one short function per verb. Heavy imports happen inside the verbs, so that `--help` is instant.

Exit codes: 0 done, 1 unexpected, 2 configuration or usage, 3 data, 4 model, 5 hardware, 6 training,
7 resume, 8 evaluation, 9 export, 10 storage, 130 interrupted or stopped. With `--json` every verb prints one JSON
document on standard output (streams: one object per line), errors included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finetuneflow.cli_options import Json, Quiet, Run, Set, WorkspaceDir
from finetuneflow.cli_plan import RecipeOption, diff, explain, lint, plan, read_settings, recipes_app, score
from finetuneflow.errors import ConfigError, DataError, FineTuneFlowError, StorageError, missing_extra
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
app.add_typer(recipes_app, name="recipes")
for verb in (plan, lint, score, diff, explain):
    app.command()(verb)

# What `finetuneflow[train]` brings; without it the light verbs still work.
TRAIN_PACKAGES = frozenset(
    {
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
        "huggingface_hub",
        "bitsandbytes",
        "sacrebleu",
        "rouge_score",
        "matplotlib",
    }
)

RUN_FIGURES_WIDTH = 62  # of the columns of `ftf runs` between a run's name and its base, gaps included


# --- data -----------------------------------------------------------------------------------------

Files = Annotated[list[Path], typer.Argument(help="Dataset files of any common format, also .gz or .zst.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Count tokens as this model does: `starter`, a folder or a hub id.")
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="A column by name: prompt=question. Repeatable. Parts: prompt, answer, system, context, messages, text, chosen, rejected, label, group.",
    ),
]
EncodingOption = Annotated[
    str | None, typer.Option("--encoding", help="Text encoding of the files. [default: detected]", show_default=False)
]
TreePaths = Annotated[Literal["best", "all"], typer.Option("--tree-paths", help="Of a conversation tree: best path, or all.")]
TemplateOption = Annotated[str, typer.Option("--template", help="Chat template: auto, a built-in name, or a .jinja file.")]
Supervised = Annotated[
    Literal["assistant", "last", "all"],
    typer.Option("--supervise", help="What enters the loss: all answers, the last, all text."),
]
Overlong = Annotated[Literal["drop", "cut", "split"], typer.Option("--overlong", help="What becomes of longer examples.")]


@data_app.command("check")
def data_check(
    files: Files,
    model: ModelOption = None,
    template: TemplateOption = "auto",
    supervise: Supervised = "assistant",
    max_length: Annotated[int, typer.Option(help="Tokens per example at most (with --model).", min=2)] = 2048,
    map_: MapOption = None,
    encoding: EncodingOption = None,
    tree_paths: TreePaths = "best",
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates/--no-near-duplicates", help="Look for nearly equal examples too.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what files hold: shapes, usable and rejected rows with reasons, duplicates, tokens."""
    from finetuneflow.data.quality import inspect_files
    from finetuneflow.terminal import print_json

    measure = _measure_with(model, template, supervise, max_length) if model else None
    reports = inspect_files(
        files,
        mapping=_mapping(map_),
        tree_paths=tree_paths,
        measure=measure,
        max_length=max_length if model else None,
        near_duplicates=near_duplicates,
        encoding=encoding,
    )
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        from finetuneflow.views import show_data_report

        for report in reports:
            show_data_report(report)
    if any(report.error is not None for report in reports):
        raise typer.Exit(3)


@data_app.command("convert")
def data_convert(
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="The canonical JSONL file to write.")],
    map_: MapOption = None,
    encoding: EncodingOption = None,
    tree_paths: TreePaths = "best",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write canonical JSONL; rejected rows go into a file beside it, with the reason."""
    from itertools import chain

    from finetuneflow.data.examples import to_examples, write_canonical
    from finetuneflow.data.sources import read_rows
    from finetuneflow.terminal import print_json, say

    if out.exists() and not overwrite:
        raise StorageError("STORAGE_EXISTS", f"{out} exists already.", remedy="Choose another name, or add --overwrite.")
    problems = out.with_name(f"{out.stem}.problems.jsonl")
    mapping = _mapping(map_)
    items = chain.from_iterable(to_examples(read_rows(file, encoding=encoding), mapping, tree_paths=tree_paths) for file in files)
    written, rejected = write_canonical(items, out, problems_path=problems)
    if as_json:
        print_json({"out": str(out), "examples": written, "problems": str(problems), "rejected": rejected})
    else:
        say(f"{written:,} examples in {out}" + (f"; {rejected:,} rejected rows in {problems}" if rejected else ""))


@data_app.command("preview")
def data_preview(
    file: Annotated[Path, typer.Argument(help="A dataset file.")],
    model: Annotated[str, typer.Option("--model", "-m", help="`starter`, a folder or a hub id.")] = "starter",
    template: TemplateOption = "auto",
    supervise: Supervised = "assistant",
    max_length: Annotated[int, typer.Option(help="Tokens per example at most.", min=2)] = 2048,
    overlong: Overlong = "cut",
    rows: Annotated[int, typer.Option(help="Examples to show.", min=1, max=1000)] = 3,
    skip: Annotated[int, typer.Option(help="Examples to pass over first.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a web page instead of printing.")] = None,
    map_: MapOption = None,
    encoding: EncodingOption = None,
    as_json: Json = False,
) -> None:
    """Show what the model will see: every token, and which of them enter the loss."""
    from itertools import islice

    from finetuneflow.data.examples import Problem, to_examples
    from finetuneflow.data.preview import preview, to_html, to_json, to_terminal
    from finetuneflow.data.sources import read_rows
    from finetuneflow.terminal import console, print_json, say
    from finetuneflow.workspace import write_atomic

    chosen, policy = _template_and_policy(model, template, supervise, max_length, overlong)
    examples = (item for item in to_examples(read_rows(file, encoding=encoding), _mapping(map_)) if not isinstance(item, Problem))
    shown = preview(islice(examples, skip, skip + rows), chosen, policy)
    if not shown.rows and not shown.problems:
        raise DataError(
            "DATASET_NOTHING_USABLE", f"{file} has no usable example to show.", remedy=f"See why: ftf data check {file}"
        )
    if as_json:
        print_json(to_json(shown))
    elif html:
        write_atomic(html, to_html(shown, title=f"{file.name} as {model} sees it"))
        say(f"Wrote {html}")
    else:
        console.print(to_terminal(shown))


def _mapping(pairs: list[str] | None) -> Any:
    from dataclasses import fields

    from finetuneflow.data.examples import Mapping

    if not pairs:
        return None
    known = [f.name for f in fields(Mapping)]
    columns = {}
    for pair in pairs:
        part, _, column = pair.partition("=")
        if part not in known or not column:
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"--map {pair[:80]!r} is not of the form part=column.",
                remedy=f"Parts: {', '.join(known)}.",
            )
        columns[part] = column
    return Mapping(**columns)


def _template_and_policy(
    model: str, template: str, supervise: Supervised, max_length: int, overlong: Overlong = "cut"
) -> tuple[Any, Any]:
    """The template of a model (its tokenizer alone is loaded) and the policy the options ask for."""
    from finetuneflow.data.templates import resolve_template
    from finetuneflow.data.tokens import Policy
    from finetuneflow.models.source import ModelSource, tokenizer_folder
    from finetuneflow.models.tokenizer import load_tokenizer

    folder, own_code = tokenizer_folder(ModelSource(model))
    tokenizer, _ = load_tokenizer(folder, run_own_code=own_code)
    policy = Policy(supervise=supervise, max_length=max_length, overlong=overlong)
    return resolve_template(tokenizer, template, consent=True), policy


def _measure_with(model: str, template: str, supervise: Supervised, max_length: int) -> Any:
    from functools import partial

    from finetuneflow.data.tokens import measure

    chosen, policy = _template_and_policy(model, template, supervise, max_length)
    return partial(measure, template=chosen, policy=policy)


# --- training ---------------------------------------------------------------------------------------


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="The run file (YAML); `ftf config` prints one to start from.", show_default=False)
    ] = None,
    recipe: RecipeOption = None,
    set_: Set = None,
    workspace: WorkspaceDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the run file and the data, then stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model as a run file, a recipe, or both say."""
    from finetuneflow.config import require_runnable

    if config is None and recipe is None:
        raise ConfigError(
            "CLI_USAGE", "There is nothing to train: name a run file or a recipe.", remedy="See `ftf recipes` and `ftf config`."
        )
    settings, origins = read_settings(config, recipe, set_)
    require_runnable(settings, where=str(config or recipe))
    if dry_run:
        _dry_run(settings, Workspace(workspace), as_json=as_json)
        return
    run_config(settings, origins, Workspace(workspace), as_json=as_json, quiet=quiet)


def run_config(settings: RunConfig, origins: dict[str, Origin], workspace: Workspace, *, as_json: bool, quiet: bool) -> RunResult:
    """Train with the view the options ask for."""
    from finetuneflow.training.run import train as train_run

    with _view(as_json=as_json, quiet=quiet) as view:
        result = train_run(settings, workspace=workspace, origins=origins, sinks=[view])
    _print_result(result, as_json=as_json, quiet=quiet)
    return result


@app.command()
def resume(
    run: Run = "latest",
    workspace: WorkspaceDir = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Go on although configuration, data, tokenizer or code changed; each change is recorded."
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue an interrupted or stopped run from its newest intact checkpoint."""
    from finetuneflow.training.run import resume as resume_run

    place = Workspace(workspace)
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
    from finetuneflow.terminal import print_json, say
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
        say(f"{run_dir.name} is not running ({before}).")
    else:
        say(f"{run_dir.name}: {'stopping after its current step' if after == 'running' else after}.")


@app.command()
def runs(workspace: WorkspaceDir = None, as_json: Json = False) -> None:
    """List all runs, newest last."""
    from finetuneflow.terminal import console, human_time, print_json, say, shorten_middle, table
    from finetuneflow.training.status import run_summary

    place = Workspace(workspace)
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


@app.command()
def logs(
    run: Run = "latest",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new lines until the run ends.")] = False,
    level: Annotated[Literal["all", "warning"], typer.Option(help="What to show: all, or only warning lines.")] = "all",
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
        say(f"weights: {result.tensors} tensors compared, {len(result.different_tensors)} differ")
        say(f"log and evaluation lines: {result.log_lines} compared, {len(result.different_lines)} differ")
        for difference in (*result.different_tensors, *result.different_lines)[:10]:
            say(f"  differs: {difference}")
        console.print("[bold green]exact[/]" if result.equal else "[bold red]not exact[/]")
    if not result.equal:
        raise typer.Exit(7)


# --- results ----------------------------------------------------------------------------------------


DataOption = Annotated[
    list[Path] | None, typer.Option("--data", help="Examples with answers. [default: what the run held out]", show_default=False)
]
SuiteOption = Annotated[str | None, typer.Option("--suite", help="Acceptance prompts (YAML); `starter` is the bundled suite.")]
JudgesOption = Annotated[
    Path | None, typer.Option("--judges", help="A Python file of your own with judge functions for the suite. It is run.")
]
Limit = Annotated[int, typer.Option(help="Questions answered at most.", min=1)]
MaxNewTokens = Annotated[int, typer.Option(help="Length of an answer at most, in tokens.", min=1)]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a model folder, a hub id, or `starter`.")] = "latest",
    data: DataOption = None,
    suite: SuiteOption = None,
    judges: JudgesOption = None,
    base: Annotated[bool, typer.Option("--base", help="Measure the run's base model instead (the adapter off).")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="A step of the run instead of its end.")] = None,
    limit: Limit = 200,
    max_new_tokens: MaxNewTokens = 128,
    name: Annotated[str | None, typer.Option(help="Name of the result file under evals/.")] = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Measure a model: loss, perplexity, scores of its answers, acceptance prompts."""
    from dataclasses import replace

    from finetuneflow.evaluation.measure import Options, options_of_run
    from finetuneflow.evaluation.measure import evaluate as measure
    from finetuneflow.inference import load_generator
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_evaluation

    target = _target(workspace, model)
    run = Path(target) if (Path(target) / "run.yaml").is_file() else None
    settings = replace(options_of_run(run) if run else Options(), limit=limit, max_new_tokens=max_new_tokens)
    examples = data if data or run is None or suite else [run / "data" / "eval.jsonl"]
    result = measure(
        load_generator(target, adapter=not base, checkpoint=checkpoint),
        examples,
        name=name or ("base" if base else "evaluation"),
        suite=_suite(suite),
        judges=_judges(judges),
        options=settings,
        out_dir=run / "evals" if run else None,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        show_evaluation(result)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A run or model; `base` is the base of the other one.")],
    b: Annotated[str, typer.Argument(help="A run or model to compare with it; `base` likewise.")],
    data: DataOption = None,
    suite: SuiteOption = None,
    judges: JudgesOption = None,
    general: Annotated[
        Path | None, typer.Option("--general", help="A text to show forgetting on. [default: a bundled one]", show_default=False)
    ] = None,
    limit: Limit = 200,
    max_new_tokens: MaxNewTokens = 128,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the whole comparison as JSON.")] = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Ask two models the same and say which is better, with its uncertainty."""
    from finetuneflow.evaluation.compare import GENERAL_TEXT
    from finetuneflow.evaluation.compare import compare as compare_models
    from finetuneflow.evaluation.questions import read_examples
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_comparison
    from finetuneflow.workspace import write_json

    first, second, run = _two_generators(workspace, a, b)
    items = _suite(suite)
    if items is None:
        paths = data or ([run / "data" / "eval.jsonl"] if run and (run / "data" / "eval.jsonl").is_file() else [])
        if not paths:
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                "There is nothing to ask: no run that held data out, no --data, no --suite.",
                remedy="Name a data file or a suite.",
            )
        items, _ = read_examples(paths)
    result = compare_models(
        first,
        second,
        items,
        judges=_judges(judges),
        max_new_tokens=max_new_tokens,
        limit=limit,
        general_text=general or GENERAL_TEXT,
    )
    if out:
        write_json(out, result.to_dict())
    if as_json:
        print_json(result.to_dict())
    else:
        show_comparison(result)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run, a model folder, a hub id, or `starter`.")] = "latest",
    message: Annotated[str | None, typer.Option("--message", help="Ask this once and leave.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Answer with the base and with the adapter.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A further adapter on the same base: name=folder or name=run. Repeatable."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A step of the run instead of its end.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 always says the likeliest.", min=0.0, max=2.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.", min=0.01, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Talk to a model; switch its adapter off and on to feel the difference."""
    from finetuneflow.chat import Chat, show_answer, talk
    from finetuneflow.inference import load_generator
    from finetuneflow.terminal import print_json

    if as_json and message is None:
        raise ConfigError("CLI_USAGE", "--json needs a --message: a conversation is for people.")

    generator = load_generator(_target(workspace, model), adapters=_further_adapters(workspace, adapter), checkpoint=checkpoint)
    conversation = Chat(generator, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if both:
        conversation.command("/both")
    if message is None:
        talk(conversation)
    elif as_json:
        print_json({"message": message, "answers": {name: "".join(pieces) for name, pieces in conversation.answer(message)}})
    else:
        show_answer(conversation, message)


@app.command()
def export(
    run: Run = "latest",
    to: Annotated[Literal["adapter", "merged", "zip"], typer.Option("--to", help="What to write.")] = "adapter",
    name: Annotated[
        str | None, typer.Option(help="Name of the folder under exports/. [default: the target]", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Stored type of merged weights.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export of that name.")] = False,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Write the result as a package, checked by loading it again."""
    from finetuneflow.export import export as export_run
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_export

    result = export_run(Workspace(workspace).run_dir(run), to, name=name, overwrite=overwrite, dtype=dtype)
    if as_json:
        print_json(result.to_dict())
    else:
        show_export(result)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the model hub answers.")] = False,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Look over this machine: GPU, PyTorch, memory, disk, versions; each line with a remedy."""
    from finetuneflow.doctor import checks, to_json, worst
    from finetuneflow.hardware import probe
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_doctor

    root = Workspace(workspace).root
    hardware = probe(root)
    found = checks(root, hardware=hardware, network=network)
    if as_json:
        print_json(to_json(found, hardware))
    else:
        show_doctor(found)
    if worst(found) == "fail":
        raise typer.Exit(5)


@app.command()
def demo(
    workspace: WorkspaceDir = None,
    seed: Annotated[int, typer.Option(help="Seed of the tuning set and the run.")] = 0,
    as_json: Json = False,
) -> None:
    """Tune the bundled model, evaluate it, compare before and after, export: all in a few minutes."""
    from finetuneflow.demo import run_demo
    from finetuneflow.terminal import print_json_line

    summary = run_demo(Workspace(workspace), seed=seed, quiet=as_json)
    if as_json:
        print_json_line(summary)


def _target(workspace: Path | None, text: str) -> str:
    """A run's folder where `text` names one, else `text` itself (a folder, a hub id, `starter`)."""
    place = Workspace(workspace)
    try:
        return str(place.run_dir(text))
    except StorageError:
        fits_several_runs = any(name.startswith(text) for name in place.run_names())
        if text == "latest" or fits_several_runs:
            raise
        return text


def _two_generators(workspace: Path | None, a: str, b: str) -> tuple[Any, Any, Path | None]:
    """Both models, loaded once where one is the base of the other; and the run whose held-out data they are asked."""
    from finetuneflow.inference import load_generator

    if a == b == "base":
        raise ConfigError("CONFIG_INVALID_VALUE", "Both sides are `base`: name a run on one.")
    targets = {text: Path(_target(workspace, text)) for text in (a, b) if text != "base"}
    runs = [target for target in reversed(targets.values()) if (target / "run.yaml").is_file()]
    if "base" not in (a, b):
        first, second = load_generator(targets[a]), load_generator(targets[b])
        return first, second, runs[0] if runs else None
    other = targets[b if a == "base" else a]
    tuned = load_generator(other)
    base = tuned.view(None, name="base") if tuned.adapters else load_generator(other, adapter=False)
    return (base, tuned, runs[0] if runs else None) if a == "base" else (tuned, base, runs[0] if runs else None)


def _further_adapters(workspace: Path | None, pairs: list[str] | None) -> dict[str, Path]:
    found = {}
    for pair in pairs or []:
        name, _, place = pair.partition("=")
        if not name or not place:
            raise ConfigError("CONFIG_INVALID_VALUE", f"--adapter {pair[:80]!r} is not of the form name=folder.")
        folder = Path(_target(workspace, place))
        found[name] = folder / "adapter" if (folder / "run.yaml").is_file() else folder
    return found


def _suite(name: str | None) -> Any:
    from finetuneflow.evaluation.suite import load_suite

    return load_suite(name) if name else None


def _judges(path: Path | None) -> Any:
    from finetuneflow.evaluation.judges import load_judges

    return load_judges(path) if path else None


def _dry_run(settings: RunConfig, workspace: Workspace, *, as_json: bool) -> None:
    """Everything up to the tokens: what would be trained on, or why it cannot be."""
    from finetuneflow.terminal import RunView, print_json, say
    from finetuneflow.training.objectives import load_materials

    view = RunView(quiet=as_json)
    events = iter(range(1, 1_000_000))

    def emit(name: str, /, **fields: Any) -> Event:
        event = {"seq": next(events), "event": name, **fields}
        view(event)
        return event

    manifest = load_materials(settings, workspace, emit).prepared.manifest
    if as_json:
        print_json(manifest)
        return
    say(
        f"{manifest['train_examples']:,} examples to train on, {manifest['eval_examples']:,} held out; "
        f"{manifest['avg_tokens']:.0f} tokens each on average, {100 * manifest['supervised_share']:.1f} % in the loss."
    )


# --- help -------------------------------------------------------------------------------------------


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


# --- shared ---------------------------------------------------------------------------------------


def _view(*, as_json: bool, quiet: bool) -> Any:
    from finetuneflow.terminal import RunView, error_console

    return RunView(error_console if as_json else None, quiet=quiet or as_json)


def _print_result(result: RunResult, *, as_json: bool, quiet: bool) -> None:
    from finetuneflow.terminal import print_json, say

    if as_json:
        curves = ("train_loss_curve", "eval_loss_curve", "inference_samples")
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
        say(f"Next:  ftf chat {name}\n       ftf evaluate {name}\n       ftf export {name} --to adapter", style="dim")
    if result.status == "stopped":  # `ftf train … && ftf export …` must not go on with half a run
        raise typer.Exit(130)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _quieten_libraries() -> None:
    """Library chatter (progress bars of loading, advice about optional kernels) has no place between our lines.

    Must come before the libraries are imported, and imports none of them itself.
    """
    import logging
    import os
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\b")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


# typer exports only this one of its usage errors; the base is common to unknown options, missing arguments and bad values.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Entry point: translates every error a user can cause into text (or JSON) and an exit code, once."""
    from finetuneflow.hardware import prefer_passive_waiting
    from finetuneflow.terminal import silence

    prefer_passive_waiting()
    _quieten_libraries()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a poor encoding is no reason to fail
    as_json = "--json" in sys.argv
    try:
        code = _run_app(as_json=as_json)
        sys.stdout.flush()
    except BrokenPipeError:  # `ftf … | head`
        silence(sys.stdout)
        code = 1
    raise SystemExit(code)


def _run_app(*, as_json: bool) -> int:
    try:
        code = app(prog_name="ftf", standalone_mode=False) or 0  # typer returns the code of typer.Exit, and 130 for Ctrl-C
    except FineTuneFlowError as error:
        return _fail(error, as_json=as_json)
    except USAGE_ERROR as error:
        return _fail_usage(error, as_json=as_json)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in TRAIN_PACKAGES:
            raise
        return _fail(missing_extra(package, "train"), as_json=as_json)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(_unusable_path(error), as_json=as_json)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if as_json:  # the trace of our own mistake goes to standard error as ever
            _fail(FineTuneFlowError("UNEXPECTED", f"{type(error).__name__}: {error}"), as_json=True)
        raise
    if code == 130:
        sys.stderr.write("\nInterrupted.\n")
    return int(code)


def _fail(error: FineTuneFlowError, *, as_json: bool) -> int:
    from finetuneflow.terminal import print_error

    print_error(error, as_json=as_json)
    return 130 if error.code == "TRAINING_INTERRUPTED" else error.exit_code


def _fail_usage(error: Any, *, as_json: bool) -> int:
    if not as_json:
        error.show()  # with the verb's usage line
        return int(error.exit_code)
    usage = error.ctx.get_usage() if error.ctx else None
    return _fail(ConfigError("CLI_USAGE", error.format_message(), context={"usage": usage}), as_json=True)


def _unusable_path(error: OSError) -> StorageError:
    """A path that the system refuses where no verb expected it: a file in place of a folder, no permission, no room."""
    return StorageError(
        "STORAGE_UNUSABLE",
        f"{error.filename} cannot be used: {error.strerror}.",
        where=str(error.filename),
        remedy="Check that the path is of the right kind and that this user may read and write it, or name another.",
    )


if __name__ == "__main__":
    main()
