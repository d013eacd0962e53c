"""`ftf data …`: check, convert, preview and mix datasets. None of these verbs loads torch; `cli.py` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finetuneflow.cli_options import Json
from finetuneflow.errors import ConfigError, DataError, ModelError, StorageError

data_app = typer.Typer(help="Look at, check, convert and mix datasets.", no_args_is_help=True, rich_markup_mode=None)

Files = Annotated[list[Path], typer.Argument(help="Dataset files of any common format, also .gz or .zst.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Count tokens as this model does: `starter`, a folder or a hub id.")
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="A column by name: prompt=question. Repeatable. Parts: prompt, answer, system, context, messages, text, chosen, rejected, label, rating, group.",
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
FormOption = Annotated[
    Literal["supervised", "pair", "rated", "prompt"],
    typer.Option("--form", help="What rows become: conversations, preference pairs, rated answers, or prompts alone."),
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
    form: FormOption = "supervised",
    map_: MapOption = None,
    encoding: EncodingOption = None,
    tree_paths: TreePaths = "best",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write canonical JSONL; rejected rows go into a file beside it, with the reason. `--form pair` makes pairs of ratings."""
    from itertools import chain

    from finetuneflow.data.examples import to_examples, write_canonical
    from finetuneflow.data.preferences import FormReader
    from finetuneflow.data.sources import read_rows
    from finetuneflow.knowledge.situation import many
    from finetuneflow.terminal import print_json, say

    if out.exists() and not overwrite:
        raise StorageError("STORAGE_EXISTS", f"{out} exists already.", remedy="Choose another name, or add --overwrite.")
    problems = out.with_name(f"{out.stem}.problems.jsonl")
    mapping = _mapping(map_)
    several = form in ("pair", "rated")
    items = chain.from_iterable(
        to_examples(read_rows(file, encoding=encoding), mapping, tree_paths=tree_paths, several_answers=several) for file in files
    )
    written, rejected = write_canonical(FormReader(form).read(items), out, problems_path=problems)
    if as_json:
        print_json({"out": str(out), "examples": written, "problems": str(problems) if rejected else None, "rejected": rejected})
    else:
        say(f"{many(written, 'example')} in {out}" + (f"; {many(rejected, 'rejected row')} in {problems}" if rejected else ""))


@data_app.command("preview")
def data_preview(
    file: Annotated[Path, typer.Argument(help="A dataset file.")],
    model: Annotated[str, typer.Option("--model", "-m", help="`starter`, a folder or a hub id.")] = "starter",
    template: TemplateOption = "auto",
    supervise: Supervised = "assistant",
    max_length: Annotated[int, typer.Option(help="Tokens per example at most.", min=2)] = 2048,
    overlong: Overlong = "cut",
    form: FormOption = "supervised",
    rows: Annotated[int, typer.Option(help="Examples to show.", min=1, max=1000)] = 3,
    skip: Annotated[int, typer.Option(help="Examples to pass over first.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a web page instead of printing.")] = None,
    map_: MapOption = None,
    encoding: EncodingOption = None,
    as_json: Json = False,
) -> None:
    """Show what the model will see: every token, and which of them enter the loss; of pairs both sides."""
    from itertools import islice

    from finetuneflow.data.examples import Problem, to_examples
    from finetuneflow.data.forms import KINDS
    from finetuneflow.data.preferences import FormReader
    from finetuneflow.data.preview import preview, to_html, to_json, to_terminal
    from finetuneflow.data.sources import read_rows
    from finetuneflow.terminal import console, print_json, say
    from finetuneflow.workspace import write_atomic

    chosen, policy = _template_and_policy(model, template, supervise, max_length, overlong)
    several = form in ("pair", "rated")
    read = to_examples(read_rows(file, encoding=encoding), _mapping(map_), several_answers=several)
    kinds = KINDS[form]
    examples = (
        item
        for item in FormReader(form).read(read)
        if not isinstance(item, Problem) and (form == "supervised" or item.kind in kinds)
    )
    shown = preview(islice(examples, skip, skip + rows), chosen, policy, form)
    if not shown.rows and not shown.problems:
        raise DataError(
            "DATASET_NOTHING_USABLE",
            f"{file} has no usable example to show" + (f" as {form}." if form != "supervised" else "."),
            remedy=f"See why: ftf data check {file}",
        )
    if as_json:
        print_json(to_json(shown))
    elif html:
        write_atomic(html, to_html(shown, title=f"{file.name} as {model} sees it"))
        say(f"Wrote {html}")
    else:
        console.print(to_terminal(shown), soft_wrap=False)  # every token is shown, in a pipe as well: panels wrap


@data_app.command("mix")
def data_mix(
    sources: Annotated[list[str], typer.Argument(help="Files with their weights: mine.jsonl=0.7 general.json=0.3.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The canonical JSONL file to write.")],
    count: Annotated[
        int | None, typer.Option(help="Examples wanted. [default: as many as keep the shares]", min=1, show_default=False)
    ] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="Use small sources again and again to keep the shares.")] = False,
    near_duplicates: Annotated[bool, typer.Option("--near-duplicates", help="Leave out nearly equal examples too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice and the order.")] = 42,
    map_: MapOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Mix conversations of several files, of any shapes, by weight; duplicates across files are left out."""
    from finetuneflow.data.mix import mix, parse_sources
    from finetuneflow.knowledge.situation import many
    from finetuneflow.terminal import console, percent, print_json, say, table

    if out.exists() and not overwrite:
        raise StorageError("STORAGE_EXISTS", f"{out} exists already.", remedy="Choose another name, or add --overwrite.")
    mixed = mix(
        parse_sources(sources),
        out,
        count=count,
        repeat=repeat,
        near_duplicates=near_duplicates,
        mapping=_mapping(map_),
        seed=seed,
    )
    if as_json:
        print_json(mixed.to_dict())
        return
    columns = ["file", "share", "got", "examples", "usable", "duplicates", "other kinds", "rejected"]
    rows = [
        (
            source.file,
            percent(source.share),
            percent(source.taken / max(mixed.examples, 1)),
            f"{source.taken:,}" + (f" ({source.repeated:,} again)" if source.repeated else ""),
            f"{source.usable:,}",
            f"{source.duplicates:,}",
            f"{source.other_kinds:,}",
            f"{source.rows_rejected:,}",
        )
        for source in mixed.sources
    ]
    console.print(table(None, columns, rows, right=range(1, len(columns))))
    rejected = sum(source.rows_rejected for source in mixed.sources)
    say(
        f"{many(mixed.examples, 'example')} in {out}"
        + (f"; {many(rejected, 'rejected row')} in {mixed.problems}" if rejected else "")
    )
    if mixed.limited_by:
        say(
            f"! {mixed.limited_by} is used up"
            + (f", and {many(mixed.left_over, 'usable example')} of the other files left out" if mixed.left_over else "")
            + ". With --repeat it is used again to keep the shares (--count: how many examples in all); or give it a smaller weight.",
            style="yellow",
        )


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

    try:
        folder, own_code = tokenizer_folder(ModelSource(model))
    except ModelError as error:
        if error.code == "MODEL_OFFLINE":  # `models/mine` can be a hub id, and a folder that is misspelt
            error.message = f"There is no folder {model}. {error.message}"
        raise
    tokenizer, _ = load_tokenizer(folder, run_own_code=own_code)
    policy = Policy(supervise=supervise, max_length=max_length, overlong=overlong)
    return resolve_template(tokenizer, template, consent=True), policy


def _measure_with(model: str, template: str, supervise: Supervised, max_length: int) -> Any:
    from functools import partial

    from finetuneflow.data.tokens import measure

    chosen, policy = _template_and_policy(model, template, supervise, max_length)
    return partial(measure, template=chosen, policy=policy)
