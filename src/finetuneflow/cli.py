"""`ftf`: one short function per verb. Heavy imports happen inside the verbs, so that `--help` is instant.

Exit codes: 0 done, 1 unexpected, 2 configuration or usage, 3 data, 4 model, 5 hardware, 6 training,
7 resume, 8 evaluation, 9 export, 10 storage, 130 interrupted or stopped. With `--json` every verb prints one JSON
document on standard output (streams: one object per line), errors included.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finetuneflow.cli_data import data_app
from finetuneflow.cli_model import model_app
from finetuneflow.cli_options import Json, OwnModule, Run, WorkspaceDir
from finetuneflow.cli_plan import diff, explain, lint, plan, recipes_app, rewards, score
from finetuneflow.cli_run import logs, resume, runs, stop, train, verify_resume
from finetuneflow.errors import ConfigError, FineTuneFlowError, ModelError, StorageError, missing_extra
from finetuneflow.workspace import Workspace

app = typer.Typer(
    name="ftf",
    help="From a dataset to a fine-tuned language model that is shown to be better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(model_app, name="model")
for verb in (plan, lint, score, diff, explain, rewards, train, resume, stop, runs, logs):
    app.command()(verb)
app.command(name="verify-resume")(verify_resume)

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


# --- results ----------------------------------------------------------------------------------------


DataOption = Annotated[
    list[Path] | None, typer.Option("--data", help="Examples with answers. [default: what the run held out]", show_default=False)
]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Acceptance prompts (YAML); `starter` (right answers) and `starter-preferred` (whole sentences) are bundled.",
    ),
]
JudgesOption = Annotated[
    Path | None, typer.Option("--judges", help="A Python file of your own with judge functions for the suite. It is run.")
]
Limit = Annotated[int, typer.Option(help="Questions answered at most.", min=1)]
VotesOption = Annotated[
    Path | None,
    typer.Option("--votes", help="Vote file: votes are added to it (JSONL), and it is training data.", show_default=False),
]
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
    module: OwnModule = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Measure a model: loss, perplexity, scores of its answers, acceptance prompts."""
    from dataclasses import replace

    from finetuneflow.evaluation.measure import Options, objective_of, options_of_run
    from finetuneflow.evaluation.measure import evaluate as measure
    from finetuneflow.inference import load_generator
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_evaluation

    target = _target(workspace, model)
    run = Path(target) if (Path(target) / "run.yaml").is_file() else None
    settings = replace(options_of_run(run) if run else Options(), limit=limit, max_new_tokens=max_new_tokens)
    examples = data if data or run is None or suite else [run / "data" / "eval.jsonl"]
    scoring = run is not None and objective_of(run) == "reward" and not (base or checkpoint or suite)  # it writes no answers
    result = measure(
        target if scoring else load_generator(target, adapter=not base, checkpoint=checkpoint, module=module),
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
    votes: VotesOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the order in which answers are shown (with --votes).")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the whole comparison as JSON.")] = None,
    module: OwnModule = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Ask two models the same and say which is better, with its uncertainty; or let people vote blind, with --votes."""
    from finetuneflow.evaluation.compare import GENERAL_TEXT
    from finetuneflow.evaluation.compare import compare as compare_models
    from finetuneflow.evaluation.questions import read_examples
    from finetuneflow.terminal import print_json
    from finetuneflow.views import show_comparison
    from finetuneflow.workspace import write_json

    if votes is not None and suite:
        raise ConfigError("CLI_USAGE", "--votes asks the questions of a data file, not those of a suite.", remedy="Give --data.")
    _require_vote_file(votes)
    first, second, run = _two_generators(workspace, a, b, module)
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
    if votes is not None:
        _take_votes(first, second, items, votes, limit=limit, max_new_tokens=max_new_tokens, seed=seed, as_json=as_json)
        return
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


def _require_vote_file(path: Path | None) -> None:
    from finetuneflow.data.votes import require_vote_file

    if path is not None:
        require_vote_file(path)


def _take_votes(first: Any, second: Any, items: Any, path: Path, *, as_json: bool, **options: Any) -> None:
    from finetuneflow.evaluation.ballots import open_polling
    from finetuneflow.knowledge.situation import many
    from finetuneflow.terminal import console, error_console, print_json, say
    from finetuneflow.voting import vote

    polling = open_polling(first, second, items, path, **options)
    vote(polling, error_console if as_json else console)
    found = polling.to_dict()
    if as_json:
        print_json(found)
        return
    counts = found["votes"]
    added = sum(counts.values())
    models = f"{first.name} {counts['a']}, {second.name} {counts['b']}, ties {counts['tie']}, both bad {counts['both_bad']}"
    told = {
        models: added,
        f"{many(found['already_voted'], 'question')} had a vote before": found["already_voted"],
        f"both models answer {many(found['same_answers'], 'question')} alike, so there is nothing to prefer": found[
            "same_answers"
        ],
        f"{many(found['open'], 'question')} left open": found["open"],
    }
    say(f"{many(added, 'vote')} added to {path}: {'; '.join(text for text, count in told.items() if count)}.")
    if not added and not found["open"]:
        say("To go on, raise --limit, or name other questions with --data.", style="dim")


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
    votes: VotesOption = None,
    module: OwnModule = None,
    workspace: WorkspaceDir = None,
    as_json: Json = False,
) -> None:
    """Talk to a model; switch its adapter off and on to feel the difference."""
    from finetuneflow.chat import Chat, show_answer, talk
    from finetuneflow.inference import load_generator
    from finetuneflow.terminal import print_json

    if as_json and message is None:
        raise ConfigError("CLI_USAGE", "--json needs a --message: a conversation is for people.")
    _require_vote_file(votes)

    further = _further_adapters(workspace, adapter)
    generator = load_generator(_target(workspace, model), adapters=further, checkpoint=checkpoint, module=module)
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    conversation = Chat(generator, system=system, votes=votes, **decoding)
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
    from finetuneflow.training.status import named_run
    from finetuneflow.views import show_export

    result = export_run(named_run(Workspace(workspace), run), to, name=name, overwrite=overwrite, dtype=dtype)
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
    """A run's folder where `text` names one (or a pipeline: its last stage), else `text` itself (a folder, a hub id, `starter`)."""
    from finetuneflow.training.status import named_run

    place = Workspace(workspace)
    try:
        return str(named_run(place, text))
    except StorageError:
        fits_several_runs = any(name.startswith(text) for name in place.run_names())
        if text == "latest" or fits_several_runs or place.find_pipeline_dir(text):
            raise
        return text


def _two_generators(workspace: Path | None, a: str, b: str, module: str | None) -> tuple[Any, Any, Path | None]:
    """Both models, loaded once where one is the base of the other; and the run whose held-out data they are asked."""
    from finetuneflow.inference import load_generator

    if a == b == "base":
        raise ConfigError("CONFIG_INVALID_VALUE", "Both sides are `base`: name a run on one.")
    targets = {text: Path(_target(workspace, text)) for text in (a, b) if text != "base"}
    runs = [target for target in reversed(targets.values()) if (target / "run.yaml").is_file()]
    if "base" not in (a, b):
        first, second = _generators_of([targets[a], targets[b]], module)
        return first, second, runs[0] if runs else None
    other = targets[b if a == "base" else a]
    tuned = load_generator(other, module=module)
    base = tuned.view(None, name="base") if tuned.adapters else load_generator(other, adapter=False, module=module)
    return (base, tuned, runs[0] if runs else None) if a == "base" else (tuned, base, runs[0] if runs else None)


def _generators_of(targets: list[Path], module: str | None) -> list[Any]:
    """Each model, with the module file where it is of that architecture; that neither is, is an error."""
    from finetuneflow.inference import load_generator

    found: list[Any] = []
    misfit = False
    for target in targets:
        try:
            found.append(load_generator(target, module=module))
        except ModelError as error:
            if error.code != "MODEL_MODULE_MISMATCH" or misfit:
                raise
            misfit = True
            found.append(load_generator(target))
    return found


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
