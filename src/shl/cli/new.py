"""`shl new`: a run folder with a Makefile that runs the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin
from shl.core import console

NAME = "new"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl new myrun && make -C myrun
  shl new gemma --model google/gemma-3-4b-it --persona humanity && make -C gemma -j2
"""


def command(
    folder: Annotated[Path, Argument(metavar="DIR", show_default=False, help="Folder to make.")],
    persona: Annotated[str | None, Option(metavar="NAME", help="A bundled persona. [authority]")] = None,
    rounds: Annotated[int | None, Option(metavar="N", min=1, help="Rounds of each arm. [4]")] = None,
    model: Annotated[
        str | None, Option("--model", metavar="ID", help="Model: toy, a hub name or a folder. [toy]")
    ] = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Make a run folder, ready to edit.

    A Makefile with model, persona, rounds and arms at the top, the prompts, and a page that says what every file is.
    """
    begin(quiet, verbose)
    from shl.new import create

    names = create(folder, persona or "authority", model or "toy", rounds or 4)
    console.note(f"{folder}: {', '.join(names)}. Next: make -C {folder}, then open {folder}/report.html")
