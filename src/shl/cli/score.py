"""`shl score`: any completions -> the same records with scores under the base model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Annotated, Any

import typer
from typer import Argument, Option

from shl.cli import options
from shl.cli.common import Where, begin, find_model, load_model
from shl.core import files, records
from shl.core.errors import Mismatch, ShlError

NAME = "score"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl score theirs.jsonl --model google/gemma-3-4b-it -o scored.jsonl
  shl gen --vec v.safetensors --no-score | shl score | shl filter > keep.jsonl
"""

BLOCK = 256  # records scored before the first is written


def command(
    context: typer.Context,
    source: Annotated[str | None, Argument(metavar="RECORDS", show_default=False, help="Records. [stdin]")] = None,
    out: options.OutRecords = None,
    model: options.Model = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: Annotated[int | None, Option(metavar="N", min=1, help="Records read together. [32]")] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Measure completions under the base model.

    Perplexity, whole and tail, and repetition, as shl gen writes them: for completions that came from elsewhere, or
    to measure anew under another model. The model is the one that the records name.
    """
    if source is None and sys.stdin.isatty():
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)
    begin(quiet, verbose)
    with files.open_out(out, bool(force)) as handle:
        rows = records.read_records(source)
        first = next(rows, None)
        if first is None:
            raise ShlError(
                "there are no records to score", hint="shl score reads what shl gen or another program writes"
            )
        named = None if model is not None else first.get("model")
        ref = find_model(Where(model, revision), {"model": named} if named else None)
        loaded = load_model(Where(ref.id, ref.revision, ["none"], None, None, trust_remote_code, device, dtype), ref)
        for record in _scored(loaded, _of(named, chain([first], rows)), batch_size or 32):
            records.write_record(handle, record)


def _of(model: str | None, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records, which must all name the model; any will do when the user chose one."""
    for record in rows:
        if model is not None and record.get("model") not in (None, model):
            raise Mismatch(
                f"record {record['id']} is from model {record['model']}, those before it from {model}",
                hint="say under which model to score all of them: --model ID",
            )
        yield record


def _scored(loaded: Any, rows: Iterator[dict[str, Any]], batch_size: int) -> Iterator[dict[str, Any]]:
    """The records in their order, each with its scores; a block at a time, in constant memory."""
    from shl.core.scores import score

    while block := list(islice(rows, BLOCK)):
        said = [record["completion"][-1]["content"] for record in block]
        found = score(loaded, [record["prompt"] for record in block], said, batch_size)
        for record, scores in zip(block, found, strict=True):
            yield {"n_tokens": scores["n_tokens"]} | record | {"scores": (record.get("scores") or {}) | scores}
