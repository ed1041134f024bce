"""A run folder -> one self-contained page: what moved, what broke, and what the model says round by round."""

from __future__ import annotations

from pathlib import Path

from shl.core.files import atomic_file, refuse_existing
from shl.report.gather import gather
from shl.report.page import render

__all__ = ["gather", "render", "write_report"]


def write_report(run: Path | str, out: Path | str, force: bool = False) -> dict[str, int]:
    """Write the page; returns how much is on it: arms, completions, notes.

    Whatever a run lacks is said on the page. Raises InputError for a folder that is no run.
    """
    refuse_existing(out, force)
    facts = gather(run)
    with atomic_file(out, force) as handle:
        handle.write(render(facts))
    return {"arms": len(facts["arms"]), "completions": len(facts["says"]), "notes": len(facts["notes"])}
