"""Dose-response curves: what a coefficient does to the text, to what the filter keeps, and to the trait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from shl.core.errors import ShlError
from shl.core.metrics import finite
from shl.core.records import Record, read_records
from shl.core.runs import Round, evaluations, rounds
from shl.plot.path import Row, gathered_rows, means, split_arm
from shl.plot.style import FLOOR, POINTS, Line, Panel, check_format, fade, save, sheet

TEXT = {
    "kept": "kept by the filter, share",
    "ppl_p50": "median perplexity under base",
    "ppl_p90": "p90 perplexity under base",
    "rep_mean": "mean repetition",
}
SCORED = {
    "auth_nats": "ln p(authority)",
    "care_nats": "ln p(care)",
    "broken": "broken free answers",
    "free_ppl_p90": "p90 perplexity of free text",
    "p_ans_any": "1 - answer mass",
}
MOST_TICKS = 6  # with more doses the axis has round numbers
_LOG = {"ppl_p50", "ppl_p90", "broken", "free_ppl_p90", "p_ans_any"}


@dataclass
class Curve:
    """One line of every panel: a vector's doses in one round of one arm, or in one file of records."""

    arm: str
    round: int | None
    values: dict[str, dict[float, float]] = field(default_factory=dict)  # reading -> coefficient -> value

    def put(self, name: str, coeff: float, value: float | None) -> None:
        if value is not None:
            self.values.setdefault(name, {})[coeff] = value


def dose_response(source: Sequence[Any] | Path | str, out: Path | str, force: bool = False) -> None:
    """Draw dose-response curves to a file; its suffix is the format.

    `source`: run folders and files of completion records (text by coefficient), ledger rows and run folders
    (evaluations with a vector by coefficient, with base at 0).
    """
    check_format(out)
    curves, levels = _gather([source] if isinstance(source, Path | str) else source)
    panels = _panels(curves, levels)
    if not panels:
        raise ShlError(
            "there is nothing to plot", hint="shl gen -o c.jsonl makes records at several coefficients, "
            "and shl eval --vec v.safetensors --coeff C --append results.tsv adds rows"
        )  # fmt: skip
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    shown = [name for name in POINTS if name in levels and any(panel.levels for panel in panels)]
    title = "Response to the dose" + ("; earlier rounds are paler" if len(curves) > len(arms) else "")
    save(sheet(panels, arms, title, shown), out, force)


def _gather(sources: Iterable[Any]) -> tuple[list[Curve], dict[str, dict[str, float]]]:
    """Every curve in the order in which arms appear, and the references that were measured."""
    curves: dict[tuple[str, int | None], Curve] = {}
    rows: list[Row] = []
    for one in sources:
        if not isinstance(one, Path | str):
            rows.append(one)
        elif Path(one).is_dir():
            rows += _folder(Path(one), curves)
        else:
            arm = Path(one).stem
            _text(list(read_records(str(one))), None, curves.setdefault((arm, None), Curve(arm, None)))
    levels = _scored(gathered_rows(rows), curves)
    return [*curves.values()], levels


def _folder(folder: Path, curves: dict[tuple[str, int | None], Curve]) -> list[Row]:
    """The completions of a run, round by round, and its evaluations as rows."""
    found = rounds(folder)
    for one in found:
        if records := [record for path in one.said for record in read_records(str(path))]:
            _text(records, _kept(one), curves.setdefault((one.arm, one.number), Curve(one.arm, one.number)))
    # completions may be all there is so far
    return gathered_rows(folder) if not found or any(evaluations(folder)) else []


def _kept(one: Round) -> set[str] | None:
    """The ids that the filter kept; None when nothing was filtered."""
    path = one.folder / "keep.jsonl"
    if not path.is_file():
        return None
    return {record["id"] for record in read_records(str(path)) if record.get("keep", True)}


def _text(records: Sequence[Record], kept: set[str] | None, curve: Curve) -> None:
    """What the records of each coefficient are like. Their own verdicts count where no filtered file stands beside."""
    if kept is None and any("keep" in record for record in records):
        kept = {record["id"] for record in records if record.get("keep")}
    doses: dict[float, list[Record]] = {}
    for record in records:
        doses.setdefault(float(record.get("coeff") or 0.0), []).append(record)
    for coeff, rows in sorted(doses.items()):
        ppl = sorted(value for row in rows if (value := finite(_score(row, "ppl"))) is not None)
        rep = [value for row in rows if (value := finite(_score(row, "rep"))) is not None]
        if coeff and kept is not None:  # a control is never kept
            curve.put("kept", coeff, sum(row["id"] in kept for row in rows) / len(rows))
        curve.put("ppl_p50", coeff, median(ppl) if ppl else None)
        curve.put("ppl_p90", coeff, ppl[min(len(ppl) - 1, int(0.9 * len(ppl)))] if ppl else None)
        curve.put("rep_mean", coeff, fmean(rep) if rep else None)


def _score(record: Record, name: str) -> Any:
    return (record.get("scores") or {}).get(name)


def _scored(rows: Sequence[Row], curves: dict[tuple[str, int | None], Curve]) -> dict[str, dict[str, float]]:
    """Add evaluations with a vector to the curves, each a mean over its rows; returns base and prompted."""
    cells: dict[tuple[str, int | None], dict[float, list[Row]]] = {}
    levels: dict[str, list[Row]] = {}
    for row in rows:
        arm, steered = split_arm(row)
        coeff, turn = finite(row.get("coeff")), finite(row.get("round"))
        if steered and coeff is not None:
            key = (arm, None if turn is None else int(turn))
            cells.setdefault(key, {}).setdefault(coeff, []).append(row)
        elif arm in POINTS:
            levels.setdefault(arm, []).append(row)
    for key, doses in cells.items():
        curve = curves.setdefault(key, Curve(*key))
        for coeff, found in sorted(doses.items()):
            for name, value in _means(found).items():
                curve.put(name, coeff, value)
    return {name: _means(found) for name, found in levels.items()}


def _means(rows: Sequence[Row]) -> dict[str, float]:
    return means(rows, {*SCORED, *(name for row in rows for name in row if name.startswith("enact_"))})


def _panels(curves: Sequence[Curve], levels: Mapping[str, Mapping[str, float]]) -> list[Panel]:
    """A panel for every reading that some curve has."""
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    enacted = sorted({name for curve in curves for name in curve.values if name.startswith("enact_")})
    titles = {**TEXT, **{name: f"free answers that enact {name[6:]}" for name in enacted}, **SCORED}
    panels = []
    for name, title in titles.items():
        panel = Panel(title, "coefficient", log=name in _LOG)
        for arm in arms:
            own = [curve for curve in curves if curve.arm == arm and name in curve.values]
            for curve, alpha in zip(own, fade(len(own)), strict=True):
                spots = [(coeff, _drawn(name, value)) for coeff, value in sorted(curve.values[name].items())]
                panel.lines.append(Line(arms.index(arm), spots, alpha))
        panel.levels = [(_drawn(name, row[name]), POINTS[who][2]) for who, row in levels.items() if name in row]
        if name == "kept":
            panel.low, panel.high = 0.0, 1.0
        doses = sorted({coeff for line in panel.lines for coeff, _ in line.spots})
        if len(doses) <= MOST_TICKS:
            panel.ticks = [(coeff, f"{coeff:g}") for coeff in doses]
        if panel.drawn():
            panels.append(panel)
    return panels


def _drawn(name: str, value: float) -> float:
    """A reading on its axis: shares on a log axis end at a floor, and answer mass is drawn as what is missing."""
    if name == "p_ans_any":
        return max(FLOOR, 1 - value)
    return max(FLOOR, value) if name == "broken" else value
