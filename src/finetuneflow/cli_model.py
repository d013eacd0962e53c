"""`ftf model`: make a model of one's own, convert checkpoints, show what a base is. `cli.py` registers these verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetuneflow.cli_options import Json
from finetuneflow.errors import ConfigError

model_app = typer.Typer(help="Make, convert and look at base models.", no_args_is_help=True, rich_markup_mode=None)

OutFolder = Annotated[Path | None, typer.Option("--out", "-o", help="The new folder to write.", show_default=False)]
Tokenizer = Annotated[str, typer.Option("--tokenizer", help="Whose tokenizer it gets: `starter`, a folder or a hub id.")]


@model_app.command("new")
def model_new(
    architecture: Annotated[str, typer.Argument(help="A Python file that brings an architecture, or `mamba_swelu`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder to write.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of its configuration: key=value. Repeatable.")
    ] = None,
    tokenizer: Tokenizer = "starter",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 42,
    as_json: Json = False,
) -> None:
    """Write a model with random weights, ready to be trained. Naming a Python file allows it to run."""
    from finetuneflow.models.new import new_model
    from finetuneflow.terminal import print_json, say

    made = new_model(architecture, out, settings=_settings(set_), tokenizer=tokenizer, seed=seed)
    if as_json:
        print_json(made)
        return
    say(f"{made['architecture']} with {made['parameters']:,} random parameters in {out}")
    module = f" --set model.module={made['module']['path']}" if made["module"] else ""
    say(f"Train it: ftf train run.yaml --set model.base={out}{module} --set training.objective=pretrain --set method.kind=full")


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    from finetuneflow.config import parse_yaml

    settings = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"--set {pair[:80]!r} is not of the form key=value.",
                remedy="Write --set hidden_size=256.",
            )
        settings[key.strip()] = parse_yaml(value, where=f"--set {key.strip()}")
    return settings


@model_app.command("convert")
def model_convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of the original MambaSWELU (.pt), or a model folder with --to.")],
    out: OutFolder = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write the original's format to this file.", show_default=False)] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer the folder gets.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of the original MambaSWELU to a model folder (--out), or a folder back (--to)."""
    from finetuneflow.terminal import print_json, say

    if out is not None and to is None:
        report = _checkpoints().convert_from_original(source, out, tokenizer=tokenizer)
        told, notes = report.to_dict(), (f"{report.num_parameters:,} parameters, {report.layout} layout.", *report.notes)
    elif to is not None and out is None:
        _checkpoints().convert_to_original(source, to)
        told, notes = {"source": str(source), "out": str(to)}, ()
    else:
        raise ConfigError(
            "CLI_USAGE",
            "Give either --out (from the original's checkpoint to a folder) or --to (from a folder to its format).",
            remedy="ftf model convert original.pt --out folder, or ftf model convert folder --to original.pt",
        )
    if as_json:
        print_json(told)
        return
    say(f"Wrote {out or to}")
    for note in notes:
        say(note)


def _checkpoints() -> Any:
    from finetuneflow.models import mamba_swelu_checkpoint

    return mamba_swelu_checkpoint


@model_app.command("show")
def model_show(
    base: Annotated[str, typer.Argument(help="A folder, a hub id, `starter`, or a size such as 7B.")],
    max_length: Annotated[int, typer.Option(help="Tokens per example that memory is told for.", min=8)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass that memory is told for.", min=1)] = 1,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hub for a model's config.json.")] = False,
    as_json: Json = False,
) -> None:
    """Architecture, parameters, and the memory each method of tuning takes. Loads no weights and runs no code."""
    from finetuneflow.planning.describe import describe_model
    from finetuneflow.terminal import print_json

    found = describe_model(base, max_length=max_length, batch_size=batch_size, network=not offline)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from finetuneflow.terminal import console, human_bytes, say, table

    context = f"{found['context']:,} tokens" if found["context"] else "not stated"
    attention = (
        "attention in every layer"
        if found["attention_layers"] == found["layers"]
        else f"{found['attention_layers']} with attention"
    )
    rows = [
        ("architecture", found["model_type"] or "unknown"),
        ("parameters", f"{found['parameters']:,} ({found['embedding_parameters']:,} of them in the token table)"),
        ("layers", f"{found['layers']}, {found['width']:,} wide, {attention}"),
        ("vocabulary", f"{found['vocabulary']:,} tokens"),
        ("context", context),
        ("adapters go on", ", ".join(found["linear_layers"]) or "nothing: it has no linear layers"),
        ("known from", found["source"]),
    ]
    console.print(table(None, ["", ""], rows, whole=(0,)))
    say(f"\nMemory of tuning it here, {found['batch_size']} x {found['max_length']:,} tokens in a forward pass:")
    methods = [
        (m["method"], f"{m['trained_parameters']:,}", human_bytes(m["memory_bytes"]), m["verdict"])
        if m["possible"]
        else (m["method"], "–", "–", m["why"])
        for m in found["methods"]
    ]
    console.print(table(None, ["method", "trained", "memory", ""], methods, right=(1, 2), whole=(0, 1, 2)))
    for note in found["notes"]:
        say(note)
