"""The trajectory of a loop: where authority and care go over the rounds, and what that costs in coherence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shl.core import runs
from shl.core.console import plain
from shl.core.errors import InputError, ShlError
from shl.core.evaluations import read_evaluation
from shl.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

POINTS = {"base": ("o", 9, "-"), "prompted": ("*", 15, "--")}  # marker and size in the plane, line in the panels
FORMATS = ("png", "svg", "pdf")
PANELS = ("p_ans_any", "json_is_valid", "broken", "free_ppl_p90")
# told apart by colour-blind eyes too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#333333"
FLOOR = 1e-3  # the log axis of 1 - coherence ends here; a perfect score lies on the edge
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


def trajectory(source: Sequence[Row] | Path | str | Iterable[Path | str], out: Path | str, force: bool = False) -> None:
    """Draw the trajectory to a file; its suffix (.png, .svg, .pdf) is the format.

    `source` is a run folder, several of them, or rows with `arm`, `round` and metrics.
    """
    kind = Path(out).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ShlError(f"cannot draw to {out}", hint=f"name the file .{', .'.join(FORMATS)}")
    rows = _rows_of(source)
    if len({str(row["model_digest"]) for row in rows if row.get("model_digest")}) > 1:
        raise ShlError("the rows come from different models", hint="plot one model at a time")
    points, paths = _gather(rows)
    if not paths and not points:
        raise ShlError("there is nothing to plot", hint="rows need arm, round, auth_nats and care_nats")
    figure = _draw(points, paths)
    with atomic_file(out, force, "wb") as handle:
        figure.savefig(handle, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


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
    return {**result["metrics"], "model_digest": result.get("model_digest"), "seed": result.get("seed"), **labels}


def _rows_of(source: Sequence[Row] | Path | str | Iterable[Path | str]) -> list[Row]:
    if isinstance(source, Path | str):
        return list(rows_of(source))
    rows: list[Row] = []
    for one in source:
        rows.extend(rows_of(one) if isinstance(one, Path | str) else [one])
    return rows


def _number(value: Any) -> float | None:
    """A metric from JSON or from a ledger's text; an empty or odd cell is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _gather(rows: Iterable[Row]) -> tuple[dict[str, dict[str, float]], list[Path2D]]:
    """Single points by name, and one path for each arm, in the order in which arms appear."""
    cells: dict[str, dict[int | None, list[Row]]] = {}
    for row in rows:
        if row.get("kind") == _STEERED or row.get("arm") == _STEERED:
            continue  # what a vector does is drawn by the dose plot; a path is of models
        arm = str(row.get("arm") or "")
        turn = _number(row.get("round"))
        cells.setdefault(arm, {}).setdefault(None if arm in POINTS or turn is None else int(turn), []).append(row)
    points = {arm: _means(cells[arm][None]) for arm in POINTS if arm in cells}
    paths = []
    for arm, turns in cells.items():
        if arm not in POINTS and (rounds := sorted(turn for turn in turns if turn is not None)):
            means = [_means(turns[turn]) for turn in rounds]
            names = {name for mean in means for name in mean}
            paths.append(Path2D(arm, rounds, {name: [mean.get(name) for mean in means] for name in names}))
    return points, paths


def _means(rows: Sequence[Row]) -> dict[str, float]:
    found = {}
    for name in ("auth_nats", "care_nats", *PANELS):
        values = [value for row in rows if (value := _number(row.get(name))) is not None]
        if values:
            found[name] = fmean(values)
    return found


def _draw(points: Mapping[str, Mapping[str, float]], paths: Sequence[Path2D]) -> Figure:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    panels = [name for name in PANELS if any(name in path.values for path in paths)]
    figure = Figure(figsize=(max(7.5, 3.4 * len(panels)), 8.2), layout=ConstrainedLayoutEngine(hspace=0.06))
    grid = figure.add_gridspec(2 if panels else 1, max(len(panels), 1), height_ratios=(1.5, 1) if panels else None)
    _draw_plane(figure.add_subplot(grid[0, :]), points, paths)
    for column, name in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1, column]), name, points, paths)
    shown = [Line2D([], [], label=_label(path.arm), markersize=6, **_style(i)) for i, path in enumerate(paths)]
    for name in points:
        marker, size, line = POINTS[name]
        shown.append(Line2D([], [], color=GREY, marker=marker, markersize=0.8 * size, linestyle=line, label=name))
    figure.legend(handles=shown, loc="outside lower center", ncols=min(6, len(shown)), frameon=False, handlelength=3)
    return figure


def _label(arm: str) -> str:
    """The name of an arm as it stands: a dollar sign starts no formula, a leading underscore hides nothing."""
    return plain(arm).replace("$", r"\$").removeprefix("_")


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of the arm with this index."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linewidth": 1.4}


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
                  markeredgecolor="white", zorder=3, **_style(index))  # fmt: skip
        _label_rounds(axes, spots, COLOURS[index % len(COLOURS)], above=index % 2 == 0)
    for name, metrics_of in points.items():
        marker, size, _ = POINTS[name]
        if spot := _spot(metrics_of):
            axes.plot(*spot, marker, color=GREY, markersize=size, markeredgecolor="white", zorder=4)
    axes.set_xlabel("ln p(authority): less deference to the left")
    axes.set_ylabel("ln p(care): more care upwards")
    axes.set_title("Trait over rounds", loc="left")
    axes.margins(0.08)
    axes.grid(alpha=0.25)


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


def _draw_panel(axes: Axes, name: str, points: Mapping[str, Mapping[str, float]], paths: Sequence[Path2D]) -> None:
    """One coherence reading over rounds on a log scale; the base and the prompted persona are level lines."""
    from matplotlib.ticker import MaxNLocator

    for index, path in enumerate(paths):
        column = path.values.get(name, [])
        drawn = [(turn, _cost(name, v)) for turn, v in zip(path.rounds, column, strict=False) if v is not None]
        axes.plot([turn for turn, _ in drawn], [v for _, v in drawn], markersize=5, clip_on=False, **_style(index))
    for point, metrics in points.items():
        if name in metrics:
            axes.axhline(_cost(name, metrics[name]), color=GREY, linestyle=POINTS[point][2], linewidth=0.9, zorder=1)
    axes.set_yscale("log")
    if name == "free_ppl_p90":
        axes.set_ylim(1.0, max(10.0, 1.2 * axes.get_ylim()[1]))  # small wobbles near the base stay small
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(FLOOR, 1.0)
    axes.set_title(_LABELS[name], loc="left", fontsize=10)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def _cost(name: str, value: float) -> float:
    """A reading as something that grows with damage and has a logarithm."""
    if name == "free_ppl_p90":
        return value
    return max(FLOOR, value if name == "broken" else 1 - value)
