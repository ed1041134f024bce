"""Is an arm better than one that is merely scaled down? python examples/matched.py results.tsv --scaled nll

For each seed the rows of the scaled arm (base, nll@0.5, nll@0.75, nll) are a curve of the metric over the trait. Every
other arm's metric is held against that curve at the arm's own trait, by straight lines between its points. Printed is
the mean of the differences over seeds with a 95% interval (Student's t), and each of them; "-" where the arm's trait
lies beyond the curve. A straight line lies above a curve that bends upwards, so read it beside the nearest points.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from shl import results
from shl.core.metrics import finite

T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # 97.5% by freedom
Rows = Mapping[str, Mapping[str, Mapping[str, str]]]  # arm -> seed -> row


def curve(rows: Rows, arms: list[str], seed: str, trait: str, metric: str) -> list[tuple[float, float]]:
    """Points (trait, metric) of the scaled arm in one seed, in order of the trait."""
    found = [rows[arm][seed] for arm in arms if seed in rows.get(arm, {})]
    pairs = [(finite(row.get(trait)), finite(row.get(metric))) for row in found]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def height(points: list[tuple[float, float]], x: float) -> float | None:
    """The curve at x; None beyond its ends."""
    for (left, low), (right, high) in pairwise(points):
        if left <= x <= right:
            return low + (high - low) * ((x - left) / (right - left) if right > left else 0.0)
    return None


def half(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over seeds (Student's t)."""
    return T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95% interval over seeds; of one seed its value."""
    if len(values) < 2:
        return "".join(f"{value:+.{digits}f}" for value in values) or "-"
    return f"{statistics.fmean(values):+.{digits}f} ± {half(values):.{digits}f}"


def told(differences: list[float | None]) -> str:
    """Mean, interval and each difference."""
    found = [one for one in differences if one is not None]
    each = ", ".join("-" if one is None else f"{one:+.3f}" for one in differences)
    if len(found) < 2:
        return f"- | {each}"
    return f"{interval(found, 3)} | {each}"


def table(rows: Rows, scaled: str, start: str, trait: str, metric: str) -> list[str]:
    """One metric of every arm of the same round against the scaled one."""
    arms = [start, *(arm for arm in rows if arm.partition("@")[0] == scaled)]
    lines = [f"| {metric} at the same {trait} | minus {scaled} scaled | by seed |", "| --- | --- | --- |"]
    for arm, by_seed in rows.items():
        if arm in arms or arm == "base" or arm.count(",") != scaled.count(","):
            continue
        differences = []
        for seed, row in by_seed.items():
            x, y = finite(row.get(trait)), finite(row.get(metric))
            there = None if x is None else height(curve(rows, arms, seed, trait, metric), x)
            differences.append(None if y is None or there is None else y - there)
        lines.append(f"| {arm} | {told(differences)} |")
    return lines


def main() -> None:
    """Read the ledger, print a table for each metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--study", help="only rows with this label")
    parser.add_argument("--scaled", default="nll", help="the arm that is scaled")
    parser.add_argument("--start", default="base", help="the arm that it is at scale 0")
    parser.add_argument("--trait", default="auth_nats")
    parser.add_argument("--metric", nargs="+", default=["broken", "enact_authority"])
    args = parser.parse_args()
    rows: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in results.distinct(results.read_rows(args.ledger)):
        if args.study is None or row.get("study") == args.study:
            rows.setdefault(row["arm"], {})[row["seed"]] = row
    for metric in args.metric:
        print("\n".join([*table(rows, args.scaled, args.start, args.trait, metric), ""]))


if __name__ == "__main__":
    main()
