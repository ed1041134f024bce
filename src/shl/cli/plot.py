"""`shl plot`: run folders or ledgers -> the trajectory of each arm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin
from shl.core import console, files
from shl.core.errors import InputError

NAME = "plot"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl plot out -o trajectory.png
  shl plot results.tsv -o trajectory.svg --force
"""


def command(
    runs: Annotated[list[Path], Argument(metavar="RUN...", show_default=False, help="Run folders, or ledgers.")],
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="Picture to write: .png, .svg or .pdf.")],
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Draw authority against care, and coherence, over the rounds of each arm."""
    begin(quiet, verbose)
    files.refuse_existing(out, bool(force))
    sources: list[Any] = []
    for run in runs:
        sources += _sources(run)
    with files.guarded_stdout():
        from shl.plot import trajectory

        trajectory(sources, out, bool(force))
    console.note(f"wrote {out}")


def _sources(run: Path) -> list[Any]:
    """A run folder as it is, a ledger as its rows."""
    from shl import results

    if run.is_dir():
        return [run]
    if run.suffix != ".tsv":
        raise InputError("is neither a run folder nor a ledger", where=str(run))
    return list(results.read_rows(run))
