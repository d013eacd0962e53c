"""The verbs that answer before a run: plan, lint, score, recipes, diff. None of them loads torch; `cli.py` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuneflow.cli_options import Json, Set, WorkspaceDir
from finetuneflow.errors import ConfigError
from finetuneflow.workspace import Workspace, read_json_object

if TYPE_CHECKING:
    from finetuneflow.config import Origin, RunConfig
    from finetuneflow.knowledge.recommend import Plan
    from finetuneflow.knowledge.situation import Situation
    from finetuneflow.pipeline_config import Pipeline

recipes_app = typer.Typer(help="Known ways to fine-tune, with their sources and their arithmetic.", rich_markup_mode=None)

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Start from a recipe: NAME or NAME:PHASE. The run file and --set come on top.")
]

RunFile = Annotated[Path | None, typer.Argument(help="A run file (YAML).", show_default=False)]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="Plan for this card instead of this machine, e.g. 'RTX 4090'.", show_default=False)
]
CountOption = Annotated[int, typer.Option("--count", "--gpus", help="Number of such cards.", min=1, max=100_000)]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Do not ask the hub for a model's config.json.")]


def read_settings(path: Path | None, recipe: str | None, overrides: list[str] | None) -> tuple[RunConfig, dict[str, Origin]]:
    """Settings from a run file, a recipe, or both: defaults < recipe < run file < --set."""
    from finetuneflow.config import build_config, load_values

    values = load_values(path) if path else {}
    where = str(path) if path else "--set"
    if recipe is None:
        return build_config(values, overrides, where=where)
    from finetuneflow.knowledge.recipes import build_with_recipe, load_phase

    found, phase = load_phase(recipe)
    return build_with_recipe(found, phase.name, values, overrides, where=where)


# --- plan ---------------------------------------------------------------------------------------------


def plan(
    config: RunFile = None,
    recipe: RecipeOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder, a hub id, `starter`, or a size such as 7B.", show_default=False)
    ] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="Training files. Repeatable.", show_default=False)] = None,
    gpu: GpuOption = None,
    count: CountOption = 1,
    goal: Annotated[
        str | None,
        typer.Option(help="What tuning is for: facts, format, style, task, domain or conversation.", show_default=False),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="The decision matrix: which method suits which card and size.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the chosen plan as a run file, each value with its reason.", show_default=False),
    ] = None,
    option: Annotated[
        str | None, typer.Option("--option", help="Write this option instead of the chosen one.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    set_: Set = None,
    offline: OfflineOption = False,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """What fits, how long it takes, what it costs, and which settings are the fastest: before anything is loaded."""
    from finetuneflow.planning import look
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_matrix, show_plan

    if matrix:
        from dataclasses import asdict

        from finetuneflow.knowledge.recommend import matrix as decision_matrix

        cells = decision_matrix()
        if as_json:
            print_json([asdict(cell) | {"differs": cell.differs} for cell in cells])
        else:
            show_matrix(cells)
        return
    from finetuneflow.knowledge.advice import whether_to_tune
    from finetuneflow.pipeline_config import load_pipeline, names_pipeline

    overrides = [*([f"model.base={_quoted(model)}"] if model else []), *(set_ or [])]
    if names_pipeline(config, recipe):
        if data or out or option:
            raise ConfigError(
                "CLI_USAGE", "A pipeline is planned as its file says: --data, --out and --option are for single runs."
            )
        pipeline = load_pipeline(config, overrides, recipe=recipe)
        _plan_pipeline(pipeline, workspace, as_json=as_json, gpu=gpu, count=count, network=not offline)
        return
    settings, origins = read_settings(config, recipe, overrides)
    if data:
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"train": [str(path) for path in data]})})
        origins["data.train"] = "yours"
    seen = look(settings, origins, workspace=Workspace(workspace), gpu=gpu, count=count, network=not offline)
    found = seen.plan()
    advice = whether_to_tune(seen.situation.data, settings, goal)
    if as_json:
        print_json({**found.to_dict(), "advice": advice.to_dict(), "notes": [*seen.notes, *found.notes]})
    else:
        show_plan(found, advice, seen)
    if out or option:
        _write_plan(found, option, settings, origins, out, overwrite=overwrite, quiet=as_json)


def _plan_pipeline(pipeline: Pipeline, workspace: Path | None, *, as_json: bool, **where: Any) -> None:
    """Every stage like a run, and what they take together."""
    from finetuneflow.planning.stages import plan_stages
    from finetuneflow.terminal import print_json
    from finetuneflow.views_pipeline import show_pipeline_plan

    found = plan_stages(pipeline, workspace=Workspace(workspace), **where)
    if as_json:
        print_json(found.to_dict())
    else:
        show_pipeline_plan(found)


def _quoted(text: str) -> str:
    """As YAML text: a model named 1.5B or `null` must stay a name."""
    import json

    return json.dumps(text)


def _write_plan(
    found: Plan,
    option: str | None,
    settings: RunConfig,
    origins: dict[str, Origin],
    out: Path | None,
    *,
    overwrite: bool,
    quiet: bool,
) -> None:
    from finetuneflow.config import dump_config
    from finetuneflow.errors import StorageError
    from finetuneflow.knowledge.recommend import to_run_config
    from finetuneflow.terminal import say
    from finetuneflow.workspace import write_atomic

    names = [entry.name for entry in found.options]
    chosen = next((entry for entry in found.options if entry.name == (option or found.choice)), None)
    if chosen is None:
        problem = f"There is no option {option!r}." if option else "No option fits, so there is nothing to write."
        raise ConfigError("CONFIG_INVALID_VALUE", problem, remedy=f"Options: {', '.join(names)}. Name one with --option.")
    if out is None:
        raise ConfigError("CLI_USAGE", "--option needs --out: the file to write.")
    if out.exists() and not overwrite:
        raise StorageError("STORAGE_EXISTS", f"{out} exists already.", remedy="Choose another name, or add --overwrite.")
    config, new_origins, reasons = to_run_config(chosen, settings, origins=origins)
    write_atomic(out, dump_config(config, new_origins, reasons))
    if not quiet:
        say(f"Wrote {out}. Start it with: ftf train {out}")


# --- lint ---------------------------------------------------------------------------------------------


def lint(
    config: RunFile = None,
    recipe: RecipeOption = None,
    gpu: GpuOption = None,
    count: CountOption = 1,
    fix: Annotated[bool, typer.Option("--fix", help="Apply the safe fixes to the run file and show the difference.")] = False,
    set_: Set = None,
    offline: OfflineOption = False,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong or doubtful in a run before it starts, why, and what to change. Exit code 2 if it would go wrong."""
    from finetuneflow.knowledge.lint import check
    from finetuneflow.pipeline_config import load_pipeline, names_pipeline
    from finetuneflow.planning import look
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_findings

    if config is None and recipe is None:
        raise ConfigError("CLI_USAGE", "There is nothing to look over: name a run file or a recipe.")
    if names_pipeline(config, recipe):
        if fix:
            raise ConfigError("CLI_USAGE", "--fix changes the file of a single run; change the stages of a pipeline by hand.")
        pipeline = load_pipeline(config, set_, recipe=recipe)
        _lint_pipeline(pipeline, workspace, as_json=as_json, gpu=gpu, count=count, network=not offline)
        return
    settings, origins = read_settings(config, recipe, set_)
    seen = look(settings, origins, workspace=Workspace(workspace), gpu=gpu, count=count, network=not offline)
    situation = seen.situation
    findings = check(situation)
    if fix:
        if config is None or set_ or recipe:
            raise ConfigError("CLI_USAGE", "--fix changes a run file: name one, without --recipe or --set.")
        fixed = _fix(config, situation, quiet=as_json)
        findings = check(fixed)
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        show_findings(findings, fixed=fix)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(2)


def _lint_pipeline(pipeline: Pipeline, workspace: Path | None, *, as_json: bool, **where: Any) -> None:
    """The findings of every stage; with `--json` each names its stage."""
    from finetuneflow.planning.stages import plan_stages
    from finetuneflow.terminal import print_json, say
    from finetuneflow.views_plan import show_findings

    plans = plan_stages(pipeline, workspace=Workspace(workspace), **where).stages
    findings = {plan.stage.name: plan.findings() for plan in plans}
    if as_json:
        print_json([finding.to_dict() | {"stage": name} for name, found in findings.items() for finding in found])
    else:
        for name, found in findings.items():
            say(f"{name}", style="bold magenta")
            show_findings(found, fixable=False)
    if any(finding.level == "error" for found in findings.values() for finding in found):
        raise typer.Exit(2)


def _fix(path: Path, situation: Situation, *, quiet: bool) -> Situation:
    """Apply the safe fixes to the file; returns the situation afterwards."""
    import difflib

    from finetuneflow.config import edit_text, load_values
    from finetuneflow.knowledge.lint import fix
    from finetuneflow.terminal import say
    from finetuneflow.workspace import write_atomic

    before = path.read_text(encoding="utf-8-sig")
    applied = fix(situation, load_values(path))
    if not applied.overrides:
        if not quiet:
            say("Nothing can be fixed safely.")
        return situation
    after = edit_text(before, applied.overrides)
    write_atomic(path, after)
    if not quiet:
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), str(path), f"{path} (fixed)", lineterm="", n=1):
            say(line, style="green" if line.startswith("+") else "red" if line.startswith("-") else "dim")
        for line in applied.difference:
            say(f"  {line}")
    return situation.changed(applied.overrides)


# --- rewards ------------------------------------------------------------------------------------------


def rewards(as_json: Json = False) -> None:
    """List the built-in rewards of grpo, rloo and ppo: what reinforcement.reward can name without any code of yours."""
    from finetuneflow.evaluation.rewards import BUILT_IN
    from finetuneflow.terminal import console, print_json, say, table

    named = [(f"{name}:{b.argument}" if b.argument else name, b) for name, b in BUILT_IN.items()]
    if as_json:
        print_json([{"reward": shown, "meaning": b.explanation, "needs_answer": b.needs_answer} for shown, b in named])
        return
    rows = [(shown, b.explanation, "yes" if b.needs_answer else "") for shown, b in named]
    console.print(table(None, ["reward", "gives", "needs an expected answer"], rows, whole=(0,)))
    say(
        "Also: file.py:function from reinforcement.reward_folder, and model:RUN, a finished run of the objective reward.",
        style="dim",
    )


# --- explain ------------------------------------------------------------------------------------------


def explain(
    what: Annotated[str, typer.Argument(help="A code of an error, a warning or a finding, or a run that failed.")],
    exit_status: Annotated[
        int | None, typer.Option("--exit-status", help="How the run's process ended, e.g. 137.", show_default=False)
    ] = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Explain a code, or why a run failed and what to change."""
    from finetuneflow.errors import CODES, StorageError
    from finetuneflow.knowledge.explain import explain_code
    from finetuneflow.knowledge.lint import RULES
    from finetuneflow.knowledge.run_warnings import WARNINGS
    from finetuneflow.terminal import console, print_json

    try:
        page = explain_code(what)
    except ConfigError as unknown:
        try:
            run_dir = Workspace(workspace).run_dir(what)
        except StorageError:
            raise unknown from None
        _explain_run(run_dir, exit_status, as_json=as_json)
        return
    if as_json:
        code = what.strip().upper()
        meaning = CODES[code] if code in CODES else WARNINGS[code].meaning if code in WARNINGS else RULES[code].title
        print_json({"code": code, "meaning": meaning, "page": page})
    else:
        from rich.markdown import Markdown

        console.print(Markdown(page) if console.is_terminal else page, markup=False, highlight=False)


def _explain_run(run_dir: Path, exit_status: int | None, *, as_json: bool) -> None:
    from finetuneflow.planning import diagnose_run, next_runs
    from finetuneflow.terminal import print_json, say
    from finetuneflow.views_plan import show_diagnosis

    found = diagnose_run(run_dir, exit_status)
    advice = next_runs(run_dir) if found is None else []
    if as_json:
        print_json(found.to_dict() if found else {"next": [item.to_dict() for item in advice]} if advice else None)
    elif found is None:
        say(f"{run_dir.name} has not failed." + (" For the next run:" if advice else ""))
        for number, item in enumerate(advice, 1):
            options = "".join(f" --set {key}={value}" for key, value in item.settings.items())
            say(f"{number}. {item.text} {item.reason}{options}")
    else:
        show_diagnosis(found)


# --- score --------------------------------------------------------------------------------------------


def score(
    config: Annotated[Path | None, typer.Argument(help="A run file to judge.", show_default=False)] = None,
    recipe: RecipeOption = None,
    params: Annotated[str | None, typer.Option(help="Parameters of the model: 124M, 7B.")] = None,
    examples: Annotated[str | None, typer.Option(help="Training examples: 114000, 52k.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per optimizer step, over all devices.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps.")] = None,
    method: Annotated[str, typer.Option(help="full, lora, qlora, dora, ia3 or prefix.")] = "full",
    sources: Annotated[int | None, typer.Option(help="Datasets that were mixed.")] = None,
    curated: Annotated[bool, typer.Option("--curated", help="Every example was chosen or checked by hand.")] = False,
    gpu: GpuOption = None,
    gpus: CountOption = 1,
    hours: Annotated[
        float | None, typer.Option(help="Duration of the run. [default: estimated for a run file]", show_default=False)
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Judge a setup against documented practice: eight marks with their reasons, and what would raise them."""
    from finetuneflow.knowledge.score import Setup, parse_count
    from finetuneflow.knowledge.score import score as judge
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_score

    if config or recipe:
        setup = _setup_of_run_file(config, recipe, set_, gpu=gpu, gpus=gpus, hours=hours, params=params, examples=examples)
    else:
        given = {"--params": params, "--examples": examples, "--steps": steps, "--lr": lr, "--batch": batch}
        if missing := [name for name, value in given.items() if value is None]:
            raise ConfigError(
                "CLI_USAGE", f"A setup without a run file needs {', '.join(missing)}.", remedy="See `ftf score --help`."
            )
        setup = Setup(
            params=parse_count(params or ""),
            examples=parse_count(examples or ""),
            steps=steps or 0,
            learning_rate=lr or 0.0,
            batch=batch or 0,
            warmup=warmup or 0,
            gpu=gpu,
            gpus=gpus if gpu else 0,
            hours=hours,
            method=method,  # type: ignore[arg-type]  # checked by Setup
            sources=sources,
            curated=curated,
        )
    found = judge(setup)
    if as_json:
        print_json(found.to_dict())
    else:
        show_score(found)


def _setup_of_run_file(
    config: Path | None,
    recipe: str | None,
    overrides: list[str] | None,
    *,
    gpu: str | None,
    gpus: int,
    hours: float | None,
    params: str | None,
    examples: str | None,
) -> Any:
    from dataclasses import replace

    from finetuneflow.knowledge.score import parse_count, setup_of
    from finetuneflow.knowledge.values import DataFacts
    from finetuneflow.planning import look

    settings, origins = read_settings(config, recipe, overrides)
    seen = look(settings, origins, gpu=gpu, count=gpus, model=params)
    data = seen.situation.data
    if examples:
        data = replace(data or DataFacts(1), examples=parse_count(examples))
    if data is None:
        raise ConfigError(
            "CLI_USAGE", "The number of examples is not known: data.train is empty.", remedy="Set data.train, or give --examples."
        )
    cost = seen.cost_with(data)
    assert seen.situation.machine is not None
    return setup_of(
        settings,
        seen.base.shape,
        seen.situation.machine,
        data,
        steps=cost.steps.steps if cost else None,
        hours=hours or (cost.seconds.expected / 3600 if cost else None),
        resolved=seen.situation.resolved,
    )


# --- recipes ------------------------------------------------------------------------------------------


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """Known ways to fine-tune, with their sources and their arithmetic."""
    if context.invoked_subcommand:
        return
    from finetuneflow.knowledge.recipes import load_recipe, recipe_names
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_recipes

    listed = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print_json([recipe.to_dict() for recipe in listed])
    else:
        show_recipes(listed)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A recipe's name.")], as_json: Json = False) -> None:
    """One recipe: what it does, where it comes from, its figures and what follows from them."""
    from finetuneflow.knowledge.recipes import load_recipe
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_recipe

    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.to_dict())
    else:
        show_recipe(recipe)


# --- diff ---------------------------------------------------------------------------------------------

Compared = Annotated[str, typer.Argument(help="A run file, a run's name, `latest`, a recipe (NAME or NAME:PHASE), or `default`.")]


def diff(a: Compared, b: Compared, workspace: WorkspaceDir = None, as_json: Json = False) -> None:
    """What differs between two run files, runs or recipes, and what follows from it."""
    from finetuneflow.knowledge.difference import difference
    from finetuneflow.terminal import print_json
    from finetuneflow.views_plan import show_difference

    first, examples_a = _settings_of(a, workspace)
    second, examples_b = _settings_of(b, workspace)
    found = difference(first, second, examples_a=examples_a, examples_b=examples_b)
    if as_json:
        print_json([entry.to_dict() for entry in found])
    else:
        show_difference(found, a, b)


def _settings_of(text: str, workspace: Path | None) -> tuple[Any, int | None]:
    """(settings, training examples where known) of a run file, a run, a recipe or the defaults."""

    from finetuneflow.config import RunConfig, load_config
    from finetuneflow.errors import StorageError
    from finetuneflow.knowledge.recipes import complete_values, load_phase, recipe_names

    if text == "default":
        return RunConfig(), None
    path = Path(text)
    if path.is_file():
        return load_config(path)[0], None
    if text.partition(":")[0] in recipe_names():
        _, phase = load_phase(text)
        return complete_values(phase), phase.dataset.examples if phase.dataset else None
    try:
        run_dir = Workspace(workspace).run_dir(text)
    except StorageError as error:
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"{text[:200]!r} is neither a run file, nor a run of this workspace, nor a recipe.",
            remedy="`ftf runs` lists the runs, `ftf recipes` the recipes.",
        ) from error
    manifest = read_json_object(run_dir / "data" / "manifest.json")
    return load_config(run_dir / "run.yaml")[0], manifest.get("train_examples")
