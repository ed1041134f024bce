"""`shl filter`: completions -> kept completions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from typer import Argument, Option

from shl.cli import options
from shl.cli.common import begin, limit, settle, vector_header
from shl.core import console, files, pools, records
from shl.core.defaults import FilterConfig
from shl.core.errors import BelowGate

NAME = "filter"
NEEDS_ARGUMENTS = False
EXAMPLES = """\b
Examples:
  shl gen --vec v.safetensors | shl filter --limit 64 > keep.jsonl
  shl filter completions.jsonl --max-ppl 50 --where 'scores.judge>=50' --rejects dropped.jsonl > keep.jsonl
"""

_LIMIT = {"metavar": "NUMBER"}


def command(
    context: typer.Context,
    source: Annotated[
        str | None, Argument(metavar="RECORDS", show_default=False, help="Completion records. [stdin]")
    ] = None,
    out: options.OutRecords = None,
    rejects: Annotated[Path | None, Option(metavar="FILE", help="Write what was dropped, with reasons.")] = None,
    everything: Annotated[
        bool | None, Option("--all", help="Write every record, with keep and reasons; drop none.")
    ] = None,
    stop: Annotated[
        int | None, Option("--limit", "-n", metavar="N", min=1, help="Stop after N kept records. [all]")
    ] = None,
    min_keep: Annotated[
        int | None, Option(metavar="N", min=0, help=f"Exit 3 when fewer are kept. [{FilterConfig.min_keep}]")
    ] = None,
    where: Annotated[
        list[str] | None, Option(metavar="TEST", help="Keep what meets FIELD OP VALUE; repeatable.")
    ] = None,
    baseline: Annotated[
        Path | None, Option(metavar="FILE", help="Control records for relative limits. [controls in the input]")
    ] = None,
    vec: Annotated[
        Path | None, Option(metavar="FILE", help="Also drop text that overlaps with this vector's personas.")
    ] = None,
    max_ppl: Annotated[str | None, Option(**_LIMIT, help="Highest perplexity under base. [relative]")] = None,
    min_ppl: Annotated[str | None, Option(**_LIMIT, help="Lowest perplexity under base. [none]")] = None,
    max_tail_ppl: Annotated[str | None, Option(**_LIMIT, help="Highest perplexity of the tail. [relative]")] = None,
    rel_ppl: Annotated[
        str | None,
        Option(**_LIMIT, help=f"Multiple of the controls' 90th percentile, or none. [{FilterConfig.rel_ppl:g}]"),
    ] = None,
    rel_tail_ppl: Annotated[
        str | None, Option(**_LIMIT, help=f"The same for the tail, or none. [{FilterConfig.rel_tail_ppl:g}]")
    ] = None,
    rel_nats: Annotated[
        str | None,
        Option(**_LIMIT, help=f"Both in nats per token, or none; the stricter holds. [{FilterConfig.rel_nats:g}]"),
    ] = None,
    max_rep: Annotated[
        str | None, Option(**_LIMIT, help=f"Largest repeated share, or none. [{FilterConfig.max_rep:g}]")
    ] = None,
    min_tokens: Annotated[
        int | None, Option(metavar="N", min=0, help=f"Fewest tokens. [{FilterConfig.min_tokens}]")
    ] = None,
    allow_narration: Annotated[bool | None, Option("--allow-narration", help="Keep talk about the trait.")] = None,
    allow_refusal: Annotated[bool | None, Option("--allow-refusal", help="Keep refusals.")] = None,
    keep_controls: Annotated[bool | None, Option("--keep-controls", help="Keep rows at coefficient 0.")] = None,
    max_similarity: Annotated[
        str | None,
        Option(**_LIMIT, help=f"Similarity that makes a near-duplicate, or none. [{FilterConfig.max_similarity:g}]"),
    ] = None,
    window: Annotated[
        int | None,
        Option(metavar="N", min=1, help=f"How many kept rows near-duplicates look back. [{FilterConfig.window}]"),
    ] = None,
    force: options.Force = None,
    quiet: options.Quiet = None,
    verbose: options.Verbose = None,
) -> None:
    """Keep the completions worth training on.

    Drops by perplexity under base, repetition, narration of the trait, refusal, length and near-duplication, and
    says how many by reason and coefficient. Needs no model: shl gen has measured.
    """
    if source is None and sys.stdin.isatty():
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)
    begin(quiet, verbose)
    from shl.filter import Baseline, Tally, annotate

    flags = {
        "max_ppl": limit(max_ppl, "--max-ppl"), "min_ppl": limit(min_ppl, "--min-ppl"),
        "max_tail_ppl": limit(max_tail_ppl, "--max-tail-ppl"), "rel_ppl": limit(rel_ppl, "--rel-ppl"),
        "rel_tail_ppl": limit(rel_tail_ppl, "--rel-tail-ppl"), "rel_nats": limit(rel_nats, "--rel-nats"),
        "max_rep": limit(max_rep, "--max-rep"),
        "max_similarity": limit(max_similarity, "--max-similarity"), "min_tokens": min_tokens,
        "allow_narration": allow_narration, "allow_refusal": allow_refusal, "keep_controls": keep_controls,
        "window": window, "min_keep": min_keep, "limit": stop, "where": tuple(where) if where else None,
    }  # fmt: skip
    cfg = settle(FilterConfig, flags)
    controls = Baseline(records.read_records(baseline)) if baseline is not None else None
    tally, failed = Tally(), None
    try:
        with files.open_out(out, bool(force)) as handle:
            with _spare(rejects, bool(force)) as spare:
                rows = records.read_records(source)
                judged = annotate(rows, cfg, baseline=controls, persona_texts=_texts(vec), tally=tally)
                _write(judged, handle, spare, bool(everything))
            # What was dropped is there by now. Below the gate what was kept is not published, so that make does not go
            # on; and where it is published, it comes last, so that make does not miss the other.
            tally.require(cfg.min_keep)
    except BelowGate as error:
        failed = error
    console.table("kept and dropped", *tally.table(), "a column for each reason; a row may have several reasons")
    if failed:
        raise failed


def _spare(path: Path | None, force: bool) -> AbstractContextManager[IO[str] | None]:
    """Where dropped rows go."""
    return nullcontext() if path is None else files.atomic_file(path, force)


def _texts(vec: Path | None) -> list[str] | None:
    """The personas whose words count as narration: the bundled ones, and those of a vector."""
    if vec is None:
        return None
    personas = vector_header(vec).get("personas") or {}
    return [*pools.persona_texts(), *(personas[side] for side in ("pos", "neg") if personas.get(side))]


def _write(judged: Iterator[dict[str, Any]], handle: IO[str], spare: IO[str] | None, everything: bool) -> None:
    """Kept rows, or all of them, to one file; dropped ones to the other."""
    for record in judged:
        if record["keep"] or everything:
            records.write_record(handle, record)
        if spare is not None and not record["keep"]:
            records.write_record(spare, record)
