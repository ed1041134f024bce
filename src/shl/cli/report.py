"""`shl report`: a run folder -> one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin
from shl.core import console

NAME = "report"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl report runs/demo -o report.html
  shl report myrun --force
"""


def command(
    run: Annotated[Path, Argument(metavar="RUN", show_default=False, help="A run folder.")],
    out: Annotated[Path | None, Option("--out", "-o", metavar="FILE", help="Page to write. [RUN/report.html]")] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Write one page about a run: did it move, did it stay sane?

    What it says now, plots, every completion round by round with search and filters, filter accounting, training, and
    where every artifact came from, in one file that needs no network. What the run lacks is said on the page.
    """
    begin(quiet, verbose)
    from shl.report import write_report

    page = out or run / "report.html"
    told = write_report(run, page, bool(force))
    lacking = f", {told['notes']} notes on what is missing or damaged" if told["notes"] else ""
    console.note(f"wrote {page}: {told['arms']} arms, {told['completions']} completions{lacking}")
