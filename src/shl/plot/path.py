"""The trajectory of a loop: where authority and care go over the rounds, and what that costs in coherence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shl.core import runs
from shl.core.errors import InputError, ShlError
from shl.core.evaluations import read_evaluation
from shl.core.metrics import finite
from shl.plot import style
from shl.plot.style import POINTS, Line, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Source = Sequence[Row] | Path | str | Iterable[Path | str | Row]

PANELS = ("p_ans_any", "json_is_valid", "broken", "free_ppl_p90")
READ = ("auth_nats", "care_nats", *PANELS)
_STEERED = runs.STEERED
_LABELS = {
    "p_ans_any": "1 - answer mass",
    "json_is_valid": "1 - valid JSON",
    "broken": "broken free answers",
    "free_ppl_p90": "p90 perplexity of free text",
}


@dataclass
class Path2D:
    """One arm: its rounds in order, each metric a mean over the rows (seeds) of that round."""

    arm: str
    rounds: list[int] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    steered: dict[int, dict[str, float]] = field(default_factory=dict)  # round -> the teacher, before healing


def trajectory(source: Source, out: Path | str, force: bool = False) -> None:
    """Draw the trajectory to a file; its suffix (.png, .svg, .pdf) is the format.

    `source` is a run folder, several of them, or rows with `arm`, `round` and metrics.
    """
    style.check_format(out)
    points, paths = _gather(gathered_rows(source))
    if not paths and not points:
        raise ShlError("there is nothing to plot", hint="rows need arm, round, auth_nats and care_nats")
    style.save(_draw(points, paths), out, force)


def rows_of(folder: Path | str) -> list[dict[str, Any]]:
    """The evaluations in a run folder as rows: base.json, prompted.json, <arm>/r<N>/{eval,steered}.json."""
    rows = [
        _row(one.file, arm=one.arm, round=one.round, **({"kind": _STEERED} if one.kind == _STEERED else {}))
        for one in runs.evaluations(folder)
    ]
    if not rows:
        raise InputError("holds no evaluations", where=str(folder), hint="a run folder is what shl new makes")
    return rows


def _row(file: Path, **labels: Any) -> dict[str, Any]:
    result = read_evaluation(file)
    told = {name: result.get(name) for name in ("model_digest", "seed", "vector", "coeff")}
    return {**result["metrics"], **told, **labels}


def gathered_rows(source: Source) -> list[Row]:
    """Rows of run folders, and rows as they are; all of one model."""
    rows: list[Row] = []
    for one in [source] if isinstance(source, Path | str) else source:
        rows.extend(rows_of(one) if isinstance(one, Path | str) else [one])
    if len({str(row["model_digest"]) for row in rows if row.get("model_digest")}) > 1:
        raise ShlError("the rows come from different models", hint="plot one model at a time")
    return rows


def split_arm(row: Row) -> tuple[str, bool]:
    """The arm of a row, and whether it was steered: a ledger calls the steered rows of an arm `<arm>-steered`."""
    arm = str(row.get("arm") or "")
    steered = row.get("kind") == _STEERED or bool(row.get("vector") and finite(row.get("coeff")))
    return (arm.removesuffix("-" + _STEERED), True) if steered or arm == _STEERED else (arm, False)


def _gather(rows: Iterable[Row]) -> tuple[dict[str, dict[str, float]], list[Path2D]]:
    """Single points by name, and one path for each arm, in the order in which arms appear."""
    cells: dict[str, dict[int | None, list[Row]]] = {}
    teachers: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        arm, steered = split_arm(row)
        turn = finite(row.get("round"))
        if steered:  # without a round it is a point of the dose plot
            if turn is not None:
                teachers.setdefault(arm, {}).setdefault(int(turn), []).append(row)
            continue
        cells.setdefault(arm, {}).setdefault(None if arm in POINTS or turn is None else int(turn), []).append(row)
    points = {arm: means(cells[arm][None], READ) for arm in POINTS if arm in cells}
    paths = []
    for arm, turns in cells.items():
        if arm not in POINTS and (rounds := sorted(turn for turn in turns if turn is not None)):
            read = [means(turns[turn], READ) for turn in rounds]
            names = {name for mean in read for name in mean}
            values = {name: [mean.get(name) for mean in read] for name in names}
            steered_at = {turn: means(found, READ) for turn, found in sorted(teachers.get(arm, {}).items())}
            paths.append(Path2D(arm, rounds, values, steered_at))
    return points, paths


def means(rows: Sequence[Row], names: Iterable[str]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    found = {name: [v for row in rows if (v := finite(row.get(name))) is not None] for name in names}
    return {name: fmean(values) for name, values in found.items() if values}


def _draw(points: Mapping[str, Mapping[str, float]], paths: Sequence[Path2D]) -> Figure:
    panels = [name for name in PANELS if any(name in path.values for path in paths)]
    figure = style.new_figure(max(7.5, 3.4 * len(panels)), 8.2)
    grid = figure.add_gridspec(2 if panels else 1, max(len(panels), 1), height_ratios=(1.5, 1) if panels else None)
    _draw_plane(figure.add_subplot(grid[0, :]), points, paths)
    for column, name in enumerate(panels):
        style.draw_panel(figure.add_subplot(grid[1, column]), _panel(name, points, paths))
    names = [*points, *([_STEERED] if any(path.steered for path in paths) else [])]
    style.legend(figure, [path.arm for path in paths], names)
    return figure


def _spot(metrics: Mapping[str, float | None]) -> tuple[float, float] | None:
    """Where a row lies in the plane, if it was measured."""
    x, y = metrics.get("auth_nats"), metrics.get("care_nats")
    return None if x is None or y is None else (x, y)


def _draw_plane(axes: Axes, points: Mapping[str, Mapping[str, float]], paths: Sequence[Path2D]) -> None:
    """The path of each arm from base through the plane of authority and care."""
    origin = _spot(points.get("base", {}))
    for index, path in enumerate(paths):
        metrics = [{name: column[i] for name, column in path.values.items()} for i in range(len(path.rounds))]
        spots = [(turn, *spot) for turn, row in zip(path.rounds, metrics, strict=True) if (spot := _spot(row))]
        line = [*([origin] if origin else []), *((x, y) for _, x, y in spots)]
        start = 1 if origin else 0  # base has a marker of its own
        axes.plot([x for x, _ in line], [y for _, y in line], markevery=slice(start, None), markersize=6,
                  markeredgecolor="white", zorder=3, **style.look(index))  # fmt: skip
        _draw_steered(axes, index, path, {turn: (x, y) for turn, x, y in spots})
        _label_rounds(axes, spots, style.COLOURS[index % len(style.COLOURS)], above=index % 2 == 0)
    for name, metrics_of in points.items():
        marker, size, _ = POINTS[name]
        if spot := _spot(metrics_of):
            axes.plot(*spot, marker, color=style.GREY, markersize=size, markeredgecolor="white", zorder=4)
    axes.set_xlabel("ln p(authority): less deference to the left")
    axes.set_ylabel("ln p(care): more care upwards")
    axes.set_title("Trait over rounds", loc="left")
    axes.margins(0.08)
    axes.grid(alpha=0.25)


def _draw_steered(axes: Axes, index: int, path: Path2D, healed: Mapping[int, tuple[float, float]]) -> None:
    """Hollow marks where the steered model of a round was, and what healing made of it as a dotted line."""
    for turn, metrics in path.steered.items():
        if (spot := _spot(metrics)) is None:
            continue
        arm = style.look(index)
        if turn in healed:
            axes.plot(*zip(spot, healed[turn], strict=True), color=arm["color"], linestyle=":", linewidth=0.9, zorder=2)
        axes.plot(*spot, marker=arm["marker"], markersize=6, zorder=3, **style.hollow(index))


def _label_rounds(axes: Axes, spots: Sequence[tuple[int, float, float]], colour: str, above: bool) -> None:
    """A number at each round; arms take turns in writing above and below, and rounds that coincide share a number."""
    groups: list[tuple[list[str], float, float]] = []
    for turn, x, y in spots:
        near = (g for g in groups if abs(g[1] - x) < 0.04 and abs(g[2] - y) < 0.04)
        if (group := next(near, None)) is not None:
            group[0].append(str(turn))
        else:
            groups.append(([str(turn)], x, y))
    for turns, x, y in groups:
        shift, align = (7, "bottom") if above else (-7, "top")
        axes.annotate(",".join(turns), (x, y), (0, shift), textcoords="offset points", ha="center", va=align,
                      fontsize=8, color=colour, zorder=5)  # fmt: skip


def _panel(name: str, points: Mapping[str, Mapping[str, float]], paths: Sequence[Path2D]) -> Panel:
    """One coherence reading over rounds on a log scale; the base and the prompted persona are level lines."""
    panel = Panel(_LABELS[name], "round", log=True, integers=True)
    for index, path in enumerate(paths):
        column = path.values.get(name, [])
        spots = [(turn, _cost(name, v)) for turn, v in zip(path.rounds, column, strict=False) if v is not None]
        panel.lines.append(Line(index, spots))
        before = [(turn, _cost(name, row[name])) for turn, row in path.steered.items() if name in row]
        panel.lines.append(Line(index, before, teacher=True))
    panel.levels = [(_cost(name, row[name]), POINTS[point][2]) for point, row in points.items() if name in row]
    if name == "free_ppl_p90":
        panel.low, panel.high = 1.0, max(10.0, panel.limits()[1])  # small wobbles near the base stay small
    else:
        panel.low, panel.high = style.FLOOR, 1.0
    return panel


def _cost(name: str, value: float) -> float:
    """A reading as something that grows with damage and has a logarithm."""
    if name == "free_ppl_p90":
        return value
    return max(style.FLOOR, value if name == "broken" else 1 - value)
