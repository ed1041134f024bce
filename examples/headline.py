"""The headline figure: trait against broken text, arm by arm. python examples/headline.py results.tsv -o headline.png

From a ledger: the rounds of each arm of a study (paths, filled where the judgments still tell nine tenths of what
they tell at base), the prompted model, and one-round controls with raw steering over its doses and random vectors where
there are any. A shift is a difference to the base row of the same seed, a point a mean over seeds. Printed beside it:

    T@base+2   the largest shift of the trait with at most 2 points more broken answers than base, and judgments that
               tell at least 90% of what the prompted model's tell: mean over seeds, 95% interval (Student's t)
    survived   rounds until more than a quarter of the answers is broken; all of them where that never comes
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matched import interval
from study import ARMS as ORDER

from shl import results
from shl.core.metrics import finite
from shl.plot import style

MORE, BROKEN, TELLS = 0.02, 0.25, 0.9
AGAINST = ("plain", "plain@0.5", "distilled")
BELOW = ("distilled", "placebo")  # whose names would lie on their neighbours'
Rows = list[results.Row]
By = dict[str, dict[int | None, dict[str, results.Row]]]  # arm -> round -> seed -> row


class Point(NamedTuple):
    """A row against the base row of its seed."""

    shift: float
    broken: float
    more: float  # broken answers beyond base's
    informed: float  # informedness in shares of base's

    def good(self, least: float) -> bool:
        return self.more <= MORE and self.informed >= least


def arranged(rows: Iterable[results.Row]) -> By:
    """Rows by arm, round and seed; what an arm that stopped left is no point."""
    found: By = {}
    for row in results.distinct(rows):
        turn = finite(row.get("round"))
        if row.get("auth_nats"):
            at = None if turn is None else int(turn)
            name = "/".join(filter(None, (row["seed"], row.get("draw"))))
            found.setdefault(row["arm"], {}).setdefault(at, {})[name] = row
    return found


def point(row: Mapping[str, str], base: Mapping[str, str], trait: str, sign: float) -> Point:
    """What a row adds to base; the trait counts towards the prompt."""
    names = (trait, "broken", "informedness")
    x, broken, tells = (finite(row.get(name)) for name in names)
    y, was, told = (finite(base.get(name)) for name in names)
    if None in (x, y, broken, was, tells, told):
        raise SystemExit(f"headline: a row of {row['arm']} lacks {trait}, broken or informedness")
    return Point(sign * (x - y), broken, broken - was, tells / told)


class Shifts:
    """One study on one model: points of each arm, by round and seed."""

    def __init__(self, rows: Rows, study: str, model: str, trait: str) -> None:
        mine = arranged(row for row in rows if row.get("study") == study and row["model"] == model)
        if "base" not in mine:
            raise SystemExit(f"headline: the ledger has no base row of study {study} on {model}")
        self.base = mine["base"][None]
        self.sign = -1.0 if trait == "auth_nats" else 1.0  # less deference is what the persona asks for
        self.trait = trait
        self.points = {
            arm: {
                turn: {name: self.point(row) for name, row in seeds.items() if row["seed"] in self.base}
                for turn, seeds in sorted(turns.items(), key=lambda one: -1 if one[0] is None else one[0])
            }
            for arm, turns in mine.items()
        }

    def point(self, row: results.Row) -> Point:
        return point(row, self.base[row["seed"]], self.trait, self.sign)

    def arms(self) -> list[str]:
        """Those with rounds, in the order in which the study names them, so that each keeps its colour."""
        found = [arm for arm, turns in self.points.items() if None not in turns]
        return sorted(found, key=lambda arm: (ORDER.index(arm) if arm in ORDER else len(ORDER), arm))

    def reach(self, arm: str) -> dict[str, float]:
        """The largest good shift of each seed; 0 where no round is good, since base itself is."""
        best: dict[str, float] = {}
        for turns in self.points[arm].values():
            for seed, one in turns.items():
                prompted = self.points["prompted"][None][seed]
                good = one.shift if one.good(TELLS * prompted.informed) else 0.0
                best[seed] = max(best.get(seed, 0.0), good)
        return dict(sorted(best.items()))

    def survived(self, arm: str) -> dict[str, int]:
        """Rounds before the first with more than a quarter broken, of each seed."""
        found: dict[str, int] = {}
        for seed in sorted(self.base):
            turns = [turns[seed] for turns in self.points[arm].values() if seed in turns]
            sound = [one.broken <= BROKEN for one in turns]
            if turns:
                found[seed] = sound.index(False) if False in sound else len(sound)
        return found


def mean(points: Iterable[Point]) -> Point:
    return Point(*map(statistics.fmean, zip(*points, strict=True)))


def controls_of(rows: Rows, study: str, model: str, trait: str) -> Shifts | None:
    """The one-round controls of a model, where the ledger has any that were read for this trait."""
    known = any(row.get("study") == study and row["model"] == model and row.get(trait) for row in rows)
    return Shifts(rows, study, model, trait) if known else None


def table(study: Shifts, against: Sequence[str], controls: Shifts | None = None) -> str:
    """The numbers beside the figure; a difference is to an arm of the study, or else to a one-round control."""
    heads = ["arm", "T@base+2", "of the prompt's", *(f"minus {other}" for other in against), "survived", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    prompted = statistics.fmean(one.shift for one in study.points["prompted"][None].values())
    for arm in study.arms():
        reach, survived = study.reach(arm), study.survived(arm)
        differences = []
        for other in against:
            where = study if controls is None or other in study.points else controls
            theirs = where.reach(other) if other in where.points and other != arm else {}
            differences.append(interval([reach[seed] - theirs[seed] for seed in reach if seed in theirs]))
        turns = len(study.points[arm])
        rounds = ", ".join(f"{n}" if n < turns else f"all {n}" for n in survived.values())
        share = f"{statistics.fmean(reach.values()) / prompted:.0%}" if prompted else "-"
        cells = [arm, interval(list(reach.values())), share, *differences, rounds, ", ".join(reach)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- the figure ---


def draw(axes: Any, study: Shifts, controls: Shifts | None, arms: Sequence[str], title: str) -> None:
    """One panel; the place of an arm among `arms` is its colour."""
    floor = 1 / 256  # half an answer of 128
    for index, arm in enumerate(arms):
        if arm not in study.points:
            continue
        path = [mean(turns.values()) for turns in study.points[arm].values()]
        look = style.look(index)
        xs, ys = [one.shift for one in path], [max(floor, one.broken) for one in path]
        axes.plot(xs, ys, color=look["color"], linewidth=1.3, zorder=3)
        for at, (x, y, one) in enumerate(zip(xs, ys, path, strict=True)):
            fill = look["color"] if one.informed >= TELLS else "white"
            axes.plot(x, y, marker=look["marker"], color=fill, markeredgecolor=look["color"], markersize=6, zorder=4)
            if at in (0, len(path) - 1):
                axes.annotate(str(at), (x, y), (5, 4), textcoords="offset points", fontsize=8, color=look["color"])
    base = mean(point(row, row, study.trait, study.sign) for row in study.base.values())
    spots = [("base", base), ("prompted", mean(study.points["prompted"][None].values()))]
    for name, one in spots:
        marker, size, _ = style.POINTS[name]
        axes.plot(one.shift, max(floor, one.broken), marker, color=style.GREY, markersize=size, zorder=5)
        spot = one.shift, max(floor, one.broken)
        axes.annotate(name, spot, (-9, 5), textcoords="offset points", fontsize=8, ha="right")
    if controls is not None:
        draw_controls(axes, controls, floor)
    axes.axhline(base.broken + MORE, color=style.GREY, linestyle="--", linewidth=0.9)
    axes.annotate("base + 2 points", (0.01, base.broken + MORE), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=7, color=style.GREY)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(top=1.15)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.08)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)


def draw_controls(axes: Any, controls: Shifts, floor: float) -> None:
    """Raw steering over its doses as a grey path, random vectors as dots, one-round controls by their names."""

    def put(one: Point, marker: str, colour: str, size: float) -> tuple[float, float]:
        spot = one.shift, max(floor, one.broken)
        axes.plot(*spot, marker, color=colour, markersize=size, zorder=2)
        return spot

    def told(spot: tuple[float, float], name: str, lift: int = 2) -> None:
        axes.annotate(name, spot, (7, lift), textcoords="offset points", fontsize=8, color="#555555")

    doses: list[tuple[float, float]] = []
    for arm, turns in controls.points.items():
        for turn, seeds in turns.items():
            if arm == "random":
                cloud = [put(one, ".", "#bbbbbb", 5) for one in seeds.values()]
                told(max(cloud, key=lambda spot: spot[1]), "random vectors")
            elif arm.startswith("raw"):
                doses.append(put(mean(seeds.values()), "x", "#888888", 5))
            elif turn is not None:
                told(put(mean(seeds.values()), "h", "#7a4fa3", 7), arm, -9 if arm in BELOW else 2)
    if doses:
        axes.plot(*zip(*sorted(doses), strict=True), color="#888888", linewidth=1, zorder=1)
        told(sorted(doses, key=lambda spot: spot[1])[-2:][0], "raw vector")


def main() -> None:
    """Print the table; with -o draw the figure, a panel for each trait and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument(
        "--study", nargs="+", default=["loops"], help="several are rows of panels, as several models are"
    )
    parser.add_argument("--controls", default="controls", help="the study of one-round controls, drawn where it exists")
    parser.add_argument("--model", nargs="+", default=["toy"])
    parser.add_argument(
        "--trait",
        nargs="+",
        default=["auth_nats", "enact_authority"],
        help="{axis} is what a study is called behind its -",
    )
    parser.add_argument("--against", nargs="+", default=list(AGAINST), help="arms to take differences to")
    parser.add_argument("--arms", nargs="+", default=["healed", "plain", "plain@0.5"], help="arms to draw")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--force", action="store_true", help="replace the figure")
    args = parser.parse_args()
    rows = results.read_rows(args.ledger)
    above = [(model, study) for model in args.model for study in args.study]
    asked = [
        (model, study, trait.format(axis=study.partition("-")[2])) for model, study in above for trait in args.trait
    ]
    panels = [(model, trait, Shifts(rows, study, model, trait)) for model, study, trait in asked]
    for model, trait, study in panels:
        controls = controls_of(rows, args.controls, model, trait)
        print(f"{model}, {trait}\n\n{table(study, args.against, controls)}\n")
    if args.out is None:
        return
    figure = style.new_figure(5.6 * len(args.trait), 0.6 + 4.2 * len(above))
    grid = figure.add_gridspec(len(above), len(args.trait))
    for at, (model, trait, study) in enumerate(panels):
        controls = controls_of(rows, args.controls, model, trait)
        axes = figure.add_subplot(grid[at // len(args.trait), at % len(args.trait)])
        draw(axes, study, controls, args.arms, f"{model}: {trait}")
        axes.set_xlabel(f"shift of {trait} towards the prompt")
        axes.set_ylabel("broken free answers")
    style.legend(figure, args.arms)
    style.save(figure, args.out, args.force)


if __name__ == "__main__":
    main()
