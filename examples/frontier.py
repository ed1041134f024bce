"""Each regulariser over the scales of its adapter: python examples/frontier.py results.tsv --study u2 -o frontier.png

--study takes several: u2 u2-filtered crosses the filter with the regulariser, and names the second's arms nll-filtered
and so on, held against the first's nll.

An arm such as kl_rev-rmse@0.5 is the adapter of kl_rev-rmse read at half its scale; without a scale it is read whole.
Printed are two tables. The first has the shift of the trait and the first metric at each scale, means over seeds. The
second holds each arm's whole frontier against that of the scaled arm: at every scale the difference at the same trait
(see matched.py), the mean of these for each seed, and its mean over seeds with a 95% interval (Student's t). Points
whose trait lies beyond the scaled arm's are left out, and their number is told. The figure has both as paths.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matched import curve, height, interval

from shl import results
from shl.core.metrics import finite
from shl.plot import style

Seeds = dict[str, results.Row]
Frontiers = dict[str, dict[float, Seeds]]  # arm -> scale -> seed -> row
NAMES = {"broken": "broken free answers", "enact_authority": "free answers that enact authority"}


def crossed(rows: Sequence[results.Row], studies: Sequence[str]) -> tuple[Frontiers, Seeds]:
    """Arms of several studies, of which the later say theirs in their names; all share the base of the first."""
    found, base = frontiers(rows, studies[0])
    for study in studies[1:]:
        kind = study.removeprefix(f"{studies[0]}-")
        found |= {f"{arm}-{kind}": scales for arm, scales in frontiers(rows, study)[0].items()}
    return found, base


def frontiers(rows: Iterable[results.Row], study: str) -> tuple[Frontiers, Seeds]:
    """First-round arms of a study by scale, and the rows at scale 0."""
    found: Frontiers = {}
    base: Seeds = {}
    for row in results.distinct(rows):
        if row.get("study") != study or "," in row["arm"] or not row.get("auth_nats"):
            continue
        if row["arm"] == "base":
            base[row["seed"]] = row
            continue
        arm, _, scale = row["arm"].partition("@")
        found.setdefault(arm, {}).setdefault(float(scale or 1), {})[row["seed"]] = row
    if not base:
        raise SystemExit(f"frontier: the ledger has no row of arm base in study {study}")
    return {arm: dict(sorted(scales.items())) for arm, scales in found.items()}, base


def shift(row: results.Row, base: Seeds, trait: str) -> float:
    """How far a row goes towards less deference, nats."""
    return number(base[row["seed"]], trait) - number(row, trait)


def number(row: results.Row, name: str) -> float:
    if (value := finite(row.get(name))) is None:
        raise SystemExit(f"frontier: a row of {row['arm']}, seed {row['seed']}, has no {name}")
    return value


def by_scale(found: Frontiers, base: Seeds, trait: str, metric: str) -> str:
    """Shift / metric of each arm at each scale."""
    scales = sorted({scale for one in found.values() for scale in one})
    lines = [f"| shift / {metric} at scale | " + " | ".join(f"{scale:g}" for scale in scales) + " |"]
    lines.append("| --- |" + " --- |" * len(scales))
    for arm, one in found.items():
        cells = [cell(one.get(scale, {}), base, trait, metric) for scale in scales]
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    return "\n".join(lines)


def cell(seeds: Seeds, base: Seeds, trait: str, metric: str) -> str:
    if not seeds:
        return "-"
    moved = statistics.fmean(shift(row, base, trait) for row in seeds.values())
    return f"{moved:+.2f} / {statistics.fmean(number(row, metric) for row in seeds.values()):.2f}"


def against(found: Frontiers, base: Seeds, scaled: str, trait: str, metrics: Sequence[str]) -> str:
    """Every other arm's frontier minus the scaled one's."""
    heads = ["frontier", *(f"{metric} minus {scaled}'s" for metric in metrics), "compared", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) - 1)]
    theirs = {"base": base, **{f"{scale:g}": seeds for scale, seeds in found[scaled].items()}}
    for arm, scales in found.items():
        if arm == scaled:
            continue
        cells = []
        for metric in metrics:
            means = differences(scales, theirs, trait, metric)
            cells.append(interval([statistics.fmean(values) for values in means.values() if values], 3))
        points, held = sum(map(len, scales.values())), sum(map(len, means.values()))
        lines.append("| " + " | ".join([arm, *cells, f"{held} of {points}", ", ".join(means)]) + " |")
    return "\n".join(lines)


def differences(
    scales: dict[float, Seeds], theirs: dict[str, Seeds], trait: str, metric: str
) -> dict[str, list[float]]:
    """For each seed the differences at the same trait, a number for each scale that can be compared."""
    found: dict[str, list[float]] = {}
    for seeds in scales.values():
        for seed, row in seeds.items():
            mine = found.setdefault(seed, [])
            there = height(curve(theirs, list(theirs), seed, trait, metric), number(row, trait))
            if there is not None:
                mine.append(number(row, metric) - there)
    return dict(sorted(found.items()))


def draw(axes: Any, found: Frontiers, base: Seeds, names: Sequence[str], trait: str, metric: str) -> None:
    """A path for each arm from base on, its place among `names` its colour; full marks at scale 1."""
    begin = statistics.fmean(number(row, metric) for row in base.values())
    for arm, scales in found.items():
        look = style.look(names.index(arm))
        spots = [(0.0, begin)]
        for seeds in scales.values():
            moved = statistics.fmean(shift(row, base, trait) for row in seeds.values())
            spots.append((moved, statistics.fmean(number(row, metric) for row in seeds.values())))
        axes.plot(*zip(*spots, strict=True), color=look["color"], linestyle=look["linestyle"], linewidth=1.2, zorder=2)
        for scale, spot in zip(scales, spots[1:], strict=True):
            fill = look["color"] if scale == 1 else "white"
            axes.plot(*spot, marker=look["marker"], color=fill, markeredgecolor=look["color"], markersize=5, zorder=3)
    axes.set_xlabel(f"shift of {trait} (nats)")
    axes.grid(alpha=0.25)


def pictured(rows: Sequence[results.Row], studies: Sequence[str], trait: str, metrics: Sequence[str]) -> Any:
    """A row of panels for each study, on the same axes and with the same colours."""
    figure = style.new_figure(5.6 * len(metrics), 4.2 * len(studies) + 0.4)
    first: dict[str, Any] = {}
    read = [frontiers(rows, study) for study in studies]
    names = list(dict.fromkeys(arm for found, _ in read for arm in found))
    for above, (study, (found, base)) in enumerate(zip(studies, read, strict=True)):
        for at, metric in enumerate(metrics):
            where = (len(studies), len(metrics), above * len(metrics) + at + 1)
            shared = first.get(metric)
            axes = figure.add_subplot(*where, sharex=shared, sharey=shared)
            first.setdefault(metric, axes)
            draw(axes, found, base, names, trait, metric)
            axes.set_title(
                NAMES.get(metric, metric) + (f", {study}" if len(studies) > 1 else ""), loc="left", fontsize=10
            )
    style.legend(figure, names)
    return figure


def main() -> None:
    """Print both tables; with -o draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--study", nargs="+", default=["u2"])
    parser.add_argument("--scaled", default="nll", help="the arm that the others are held against")
    parser.add_argument("--trait", default="auth_nats")
    parser.add_argument("--metric", nargs="+", default=["broken", "enact_authority"])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--force", action="store_true", help="replace the figure")
    args = parser.parse_args()
    rows = results.read_rows(args.ledger)
    found, base = crossed(rows, args.study)
    if args.scaled not in found:
        raise SystemExit(f"frontier: study {args.study[0]} has no arm {args.scaled}; it has {', '.join(found)}")
    print(by_scale(found, base, args.trait, args.metric[0]), end="\n\n")
    print(against(found, base, args.scaled, args.trait, args.metric))
    if args.out:
        style.save(pictured(rows, args.study, args.trait, args.metric), args.out, args.force)


if __name__ == "__main__":
    main()
