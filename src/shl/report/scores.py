"""The evaluations of a run as rows, each held against base where both were measured in the same way."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shl.core.evaluations import read_evaluation
from shl.core.metrics import metric
from shl.core.runs import Scored, evaluations
from shl.core.strict import is_number
from shl.report.notes import Notes
from shl.report.words import TABLE, number

Row = dict[str, Any]

ALIKE = ("suite", "model_digest", "settings", "n")  # what must agree before two evaluations have a difference


def read_scores(root: Path, notes: Notes) -> list[Row]:
    """Base, prompted, then each arm round by round: metrics, intervals, verdict, and the difference to base."""
    rows = [row for one in evaluations(root) if (row := notes.attempt(one.file, functools.partial(_row, one)))]
    base = next((row for row in rows if row["kind"] == "base"), None)
    for row in rows:
        row["delta"] = {}
        if base is None or row is base:
            continue
        if differs := [name for name in ALIKE if row["same"][name] != base["same"][name]]:
            notes.add(row["file"], f"was not measured like base.json: another {', '.join(differs)}",
                      "measure it again with the same options; no difference to base is shown")  # fmt: skip
            continue
        row["delta"] = {
            name: value - other
            for name, value in row["metrics"].items()
            if value is not None and (other := base["metrics"].get(name)) is not None
        }
    return rows


def _row(scored: Scored, path: Path) -> Row:
    """One evaluation file, reduced to what a page shows."""
    result = read_evaluation(path)
    return {
        "file": path,
        "arm": scored.arm,
        "round": scored.round,
        "kind": scored.kind,
        "metrics": {name: number(value) for name, value in result["metrics"].items()},
        "ci": _intervals(result.get("ci")),
        "why": {name: str(why) for name, why in _mapping(result.get("missing")).items()},
        "retain": {name: number(value) for name, value in _mapping(result.get("retain")).items()},
        "verdict": str(result.get("verdict") or ""),
        "coeff": number(result.get("coeff")),
        "system": result["system"] if isinstance(result.get("system"), str) else None,
        "model": str(result.get("model") or ""),
        "n": result.get("n"),
        "seed": result.get("seed"),
        "adapters": [str(one) for one in result.get("adapters") or () if isinstance(one, str)],
        "vector": result.get("vector"),
        "settings": _mapping(result.get("settings")),
        "same": {name: result.get(name) for name in ALIKE},
    }


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _intervals(value: Any) -> dict[str, list[float]]:
    """The intervals that are pairs of numbers."""
    pairs = {name: pair for name, pair in _mapping(value).items() if isinstance(pair, list) and len(pair) == 2}
    return {name: [float(end) for end in pair] for name, pair in pairs.items() if all(map(is_number, pair))}


def traits(rows: list[Row], axis: str | None) -> list[str]:
    """The trait metrics that were measured, the one that tells most about the persona first.

    Free answers that enact the trait come before moral judgments, which only speak of authority and care.
    """
    names = list(dict.fromkeys(name for row in rows for name, value in row["metrics"].items() if value is not None))
    wanted = [name for name in names if name.startswith(("enact_", "agree_"))]
    wanted.sort(key=lambda name: (name != f"enact_{axis}", not name.startswith("enact_"), name))
    return [*wanted, *(name for name in ("auth_nats", "care_nats") if name in names)]


def columns(rows: list[Row], first: list[str]) -> list[str]:
    """Every metric that was measured: traits, then what the verdict looks at, then the rest."""
    names = list(dict.fromkeys(name for row in rows for name, value in row["metrics"].items() if value is not None))
    return [*dict.fromkeys([*first, *(name for name in TABLE if name in names), *names])]


def described(names: list[str]) -> dict[str, dict[str, str]]:
    """What the page says about each metric."""
    return {name: metric(name)._asdict() for name in names}
