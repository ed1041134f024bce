"""`shl info`: any artifact -> what it is, where it came from, its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin
from shl.core import files, records

NAME = "info"
NEEDS_ARGUMENTS = True
EXAMPLES = """\b
Examples:
  shl info v.safetensors
  shl info out/r1/adapter --json | jq .shl.parents
"""


def command(
    path: Annotated[Path, Argument(metavar="PATH", show_default=False, help="File or folder.")],
    as_json: Annotated[bool | None, Option("--json", help="One JSON object instead of text.")] = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Say what an artifact is, and where it came from.

    Of a vector, records, an adapter, an evaluation, a ledger, a model or a run folder.
    """
    begin(quiet, verbose)
    from shl import info

    facts = info.describe(path)
    with files.data_stdout() as handle:
        handle.write((records.dumps(facts) if as_json else "\n".join(info.lines(facts))) + "\n")
