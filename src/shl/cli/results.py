"""`shl results`: the ledger -> markdown tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin
from shl.core import files

NAME = "results"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl results
  shl results results.tsv --by reg,round --metric auth_nats,p_ans_any
"""


def command(
    ledger: Annotated[
        Path, Argument(metavar="LEDGER", show_default=False, help="Ledger to read. [results.tsv]")
    ] = Path("results.tsv"),
    by: Annotated[str | None, Option(metavar="COLUMNS", help="Columns to group by. [arm]")] = None,
    metric: Annotated[
        str | None, Option(metavar="COLUMNS", help="Columns to average. [traits, coherence and competence]")
    ] = None,
    out: options.OutRecords = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Show the ledger as tables: mean, spread, n and seeds by arm.

    In markdown, with the command lines. Rows of different models, suites, settings or sample sizes are never put
    into one table.
    """
    begin(quiet, verbose)
    from shl import results

    rows = results.read_rows(ledger)
    columns = tuple(by.split(",")) if by else ("arm",)
    text = results.markdown(rows, columns, tuple(metric.split(",")) if metric else results.METRICS)
    with files.open_out(out, bool(force)) as handle:
        handle.write(text + "\n")
