"""Filter accounting: of the completions of a round, how many were kept, and why the others were not, by coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shl.core.errors import ShlError
from shl.core.records import Record, check_record
from shl.core.runs import Round
from shl.filter import REASONS, Tally, annotate
from shl.report.notes import Notes


@dataclass
class Filtered:
    """The completions of a round and what became of each: id -> reasons, empty when kept; None: not filtered yet."""

    records: list[Record]
    judged: dict[str, list[str]] | None
    source: str  # where the reasons come from
    silent: int = 0  # dropped, although reasons worked out again would have kept them
    against: int = 0  # kept, although reasons worked out again would have dropped them


def read_filtered(one: Round, notes: Notes) -> Filtered | None:
    """Join completions with keep.jsonl and rejects.jsonl; None when the round has none of them."""
    said = _records(one, "completions.jsonl", notes)
    if said is None and (said := _records(one, "completions.jsonl.part", notes)) is not None:
        notes.add(one.folder / "completions.jsonl.part", "is unfinished: gen was interrupted", "run that line again")
    kept, rejected = _records(one, "keep.jsonl", notes), _records(one, "rejects.jsonl", notes)
    if kept is None:
        return None if said is None else Filtered(said, None, "")
    marked = [*kept, *(rejected or ())]
    judged = {row["id"]: _reasons(row) for row in kept} | {r["id"]: _reasons(r, dropped=True) for r in rejected or ()}
    # of a pipe there is only what the filter wrote: kept ones first, so put in the order of the doses again
    records = sorted(marked, key=lambda row: row.get("coeff") or 0.0) if said is None else said
    unknown = [row for row in records if row["id"] not in judged]
    if not unknown:
        return Filtered(records, judged, f"reasons from {'rejects.jsonl' if rejected else 'keep.jsonl'}")
    found = _recomputed(records)
    return Filtered(
        records,
        judged | {row["id"]: found.get(row["id"]) or ["unexplained"] for row in unknown},
        "reasons worked out again with the default limits, for want of rejects.jsonl",
        silent=sum(not found.get(row["id"]) for row in unknown),
        against=sum(bool(found.get(name)) for name, reasons in judged.items() if not reasons),
    )


def _records(one: Round, name: str, notes: Notes) -> list[Record] | None:
    path = one.folder / name
    return notes.lines(path, lambda row: check_record(row, str(path)))


def _reasons(row: Record, dropped: bool = False) -> list[str]:
    """The reasons that a row carries; a row of keep.jsonl may be there to say that it was dropped (--all)."""
    if row.get("keep", not dropped):
        return []
    return [str(one) for one in row.get("reasons") or ()] or ["unexplained"]


def _recomputed(records: list[Record]) -> dict[str, list[str]]:
    """Reasons under the filter's own default limits; nothing where the scores that they need are missing."""
    try:
        return {row["id"]: row["reasons"] for row in annotate(records)}
    except ShlError:
        return {row["id"]: ["control"] for row in records if not row.get("coeff")}


def account(one: Round, filtered: Filtered) -> dict[str, Any]:
    """Counts by coefficient; a record may have several reasons."""
    tally = Tally()
    for record in filtered.records:
        reasons = (filtered.judged or {}).get(record["id"], [])
        tally.add({"coeff": record.get("coeff") or 0.0, "keep": filtered.judged is not None and not reasons,
                   "reasons": reasons})  # fmt: skip
    rows = [
        {"coeff": coeff, "read": read, "kept": tally.kept[coeff], "reasons": dict(tally.dropped[coeff])}
        for coeff, read in sorted(tally.read.items())
    ]
    known = [*REASONS, *sorted(set(tally.by_reason) - set(REASONS))]
    return {
        "arm": one.arm,
        "round": one.number,
        "filtered": filtered.judged is not None,
        "source": filtered.source,
        "silent": filtered.silent,
        "against": filtered.against,
        "reasons": [reason for reason in known if tally.by_reason[reason]],
        "rows": rows,
    }
