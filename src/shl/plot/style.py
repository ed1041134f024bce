"""What all figures share: colours and markers of arms, panels of lines, and how a figure becomes a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shl.core.console import plain
from shl.core.errors import ShlError
from shl.core.files import atomic_file
from shl.core.runs import STEERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
# told apart by colour-blind eyes too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#333333"
POINTS = {"base": ("o", 9, "-"), "prompted": ("*", 15, "--")}  # marker and size in the plane, line in the panels
FLOOR = 1e-3  # the log axis of 1 - coherence ends here; a perfect score lies on the edge
_LOG_TICKS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Line:
    """One line of a panel: the arm's index chooses colour and marker, `alpha` sets earlier rounds back."""

    arm: int
    spots: Sequence[tuple[float, float]]
    alpha: float = 1.0
    teacher: bool = False  # the steered model: hollow marks that no line joins


@dataclass
class Panel:
    """One small plot: lines and level lines over the same axes. Limits that are None come from what is drawn."""

    title: str
    x_label: str
    lines: list[Line] = field(default_factory=list)
    levels: list[tuple[float, str]] = field(default_factory=list)  # height, style of line
    log: bool = False
    low: float | None = None
    high: float | None = None
    integers: bool = False
    ticks: Sequence[tuple[float, str]] | None = None

    def drawn(self) -> bool:
        return any(line.spots for line in self.lines)

    def limits(self) -> tuple[float, float]:
        """The ends of the y axis, apart even where all values are one."""
        values = [y for line in self.lines for _, y in line.spots] + [y for y, _ in self.levels]
        low, high = min(values), max(values)
        if self.log:
            margin = max((high / low) ** 0.06, 1.05)
            low, high = low / margin, high * margin
        else:
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
            low, high = low - margin, high + margin
        return low if self.low is None else self.low, high if self.high is None else self.high


def check_format(out: Path | str) -> str:
    """The format that the file's suffix names; an error when no figure can be written so."""
    kind = Path(out).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ShlError(f"cannot draw to {out}", hint=f"name the file .{', '.join(FORMATS)}")
    return kind


def save(figure: Figure, out: Path | str, force: bool) -> None:
    """Write a figure; the same figure gives the same bytes."""
    kind = check_format(out)
    dates = {"svg": "Date", "pdf": "CreationDate"}  # the time would make every file another
    import matplotlib

    # ids in an SVG are random but for this
    with atomic_file(out, force, "wb") as handle, matplotlib.rc_context({"svg.hashsalt": "shl"}):
        figure.savefig(handle, format=kind, dpi=150, metadata={dates[kind]: None} if kind in dates else None)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no screen."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(hspace=0.06))


def sheet(panels: Sequence[Panel], arms: Sequence[str], title: str, levels: Iterable[str] = ()) -> Figure:
    """A figure of panels, at most three in a row, with one legend for all of them."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(5.5, 3.9 * columns), 0.9 + 2.7 * rows)
    grid = figure.add_gridspec(rows, columns)
    for at, panel in enumerate(panels):
        draw_panel(figure.add_subplot(grid[at // columns, at % columns]), panel)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    legend(figure, arms, levels)
    return figure


def legend(figure: Figure, arms: Sequence[str], levels: Iterable[str] = ()) -> None:
    """Arms and references, below everything."""
    from matplotlib.lines import Line2D

    shown = [Line2D([], [], label=label(arm), markersize=6, **look(index)) for index, arm in enumerate(arms)]
    for name in levels:
        if name == STEERED:
            shown.append(Line2D([], [], label="steered, before healing", marker="o", **hollow(None)))
            continue
        marker, size, line = POINTS[name]
        shown.append(Line2D([], [], color=GREY, marker=marker, markersize=0.8 * size, linestyle=line, label=name))
    figure.legend(handles=shown, loc="outside lower center", ncols=min(6, len(shown)), frameon=False, handlelength=3)


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Scale and limits come first: matplotlib's own choice for a single height is no axis at all."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = panel.limits()
    if panel.log:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    for line in filter(lambda line: line.spots, panel.lines):  # an empty one has an extent all the same
        style = look(line.arm) | (hollow(line.arm) if line.teacher else {})
        axes.plot(*zip(*line.spots, strict=True), markersize=5, clip_on=False, alpha=line.alpha, **style)
    for height, dashes in panel.levels:
        axes.axhline(height, color=GREY, linestyle=dashes, linewidth=0.9, zorder=1)
    if panel.log and high / low < 100:  # a decade line or two would say little
        axes.yaxis.set_major_locator(LogLocator(subs=_LOG_TICKS))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.x_label)
    if panel.ticks is not None:
        axes.set_xticks([at for at, _ in panel.ticks], [name for _, name in panel.ticks])
    elif panel.integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def label(arm: str) -> str:
    """The name of an arm as it stands: a dollar sign starts no formula, a leading underscore hides nothing."""
    return plain(arm).replace("$", r"\$").removeprefix("_")


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the arm with this index; where colours begin anew, lines are dashed."""
    line = "-" if index < len(COLOURS) else "--"
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1.4, "linestyle": line}


def hollow(index: int | None) -> dict[str, Any]:
    """The look of a steered point of an arm; of any arm, for None."""
    colour = GREY if index is None else COLOURS[index % len(COLOURS)]
    return {"linestyle": "none", "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.3}


def fade(count: int) -> Iterator[float]:
    """Opacities of rounds in order: the last is drawn in full."""
    return (0.3 + 0.7 * (at + 1) / count for at in range(count))
