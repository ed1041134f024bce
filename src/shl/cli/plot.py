"""`shl plot`: run folders, ledgers, records or adapters -> a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin, usage
from shl.core import console, files
from shl.core.errors import InputError

NAME = "plot"
NEEDS_ARGUMENTS = True
KINDS = ("trajectory", "dose", "training")
EXAMPLES = """\b
Examples:
  shl plot myrun -o trajectory.png
  shl plot completions.jsonl results.tsv --kind dose -o dose.svg --force
"""


def command(
    sources: Annotated[
        list[Path],
        Argument(metavar="SOURCE...", show_default=False, help="Run folders, ledgers, records or adapters."),
    ],
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="Picture to write: .png, .svg or .pdf.")],
    kind: Annotated[
        str | None, Option(metavar="KIND", help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}. [{KINDS[0]}]")
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Draw a run: its path, its response to doses, or its training.

    Several arms share one figure. trajectory: authority against care, and coherence, over the rounds (run folders,
    ledgers). dose: text, survival and trait by coefficient (completion records, run folders, ledgers). training: the
    logs (run folders, adapters).
    """
    begin(quiet, verbose)
    chosen = kind or KINDS[0]
    if chosen not in KINDS:
        raise usage(f"{chosen!r} is none of {', '.join(KINDS)}", "--kind")
    files.refuse_existing(out, bool(force))
    found = [one for source in sources for one in _of(source, chosen)]
    with files.guarded_stdout():
        from shl import plot

        plot.KINDS[chosen](found, out, bool(force))
    console.note(f"wrote {out}")


def _of(source: Path, kind: str) -> list[Any]:
    """A folder as it is, and a ledger as its rows; completion records have doses only."""
    from shl import results

    if source.is_dir():
        return [source]
    if source.suffix == ".jsonl" and kind == "dose":
        return [source]
    if source.suffix == ".tsv" and kind != "training":
        return list(results.read_rows(source))
    known = {"trajectory": "a run folder or a ledger", "dose": "a run folder, a ledger or completion records",
             "training": "a run folder or an adapter"}  # fmt: skip
    raise InputError(f"is not {known[kind]}", where=str(source), hint="shl info says what it is")
