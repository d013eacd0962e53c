"""Options that several verbs share, worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
WorkspaceDir = Annotated[
    Path | None,
    typer.Option(
        "--workspace", help="Data directory. [default: $FTF_HOME or ./ftf-workspace]", show_default=False, file_okay=False
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only errors.")]
Run = Annotated[str, typer.Argument(help="A run's name, a unique beginning of it, its folder, or `latest`.")]
OwnModule = Annotated[
    str | None,
    typer.Option(
        "--module",
        help="Python file of an architecture of your own; naming it runs it. A run keeps its copy.",
        show_default=False,
    ),
]
RunOrPipeline = Annotated[
    str, typer.Argument(help="The name of a run or a pipeline, a unique beginning of it, its folder, or `latest`.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]
