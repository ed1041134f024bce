"""Which arm of a table is best, if any: ahead of every other by more than the spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from shl.core.metrics import finite, is_trait
from shl.core.metrics import metric as metric_of
from shl.core.runs import REFERENCES

Row = Mapping[str, str]
Name = tuple[str, ...]
Groups = Mapping[Name, Sequence[Row]]

BOLD = (
    "Bold: better than every other arm by more than the standard deviation of either. Base and prompted are no arms; a "
    "trait is better towards the prompt, and arms with a broken or collapsed row do not compete in it."
)
NO_BOLD = (
    "Nothing is marked as best: no arm is better than every other by more than the standard deviation of either "
    "(an arm with one row has none)."
)


def best(groups: Groups, metric: str) -> Name | None:
    """The arm that is better than every other by more than the standard deviation of either; None when none is.

    Base and prompted rows are no arms. A trait has no better side of its own: it is the one that the prompted rows lie
    on, and an arm with a broken or collapsed row is no candidate, since a collapsed model makes traits look excellent.
    """
    found_arms = arms(groups)
    if is_trait(metric):
        way = _meant(groups, metric)
        found_arms = {name: rows for name, rows in found_arms.items() if not any(_broken(row) for row in rows)}
    else:
        way = {"up": 1, "down": -1}.get(metric_of(metric).better, 0)
    found = {name: _numbers(rows, metric) for name, rows in found_arms.items()}
    found = {name: values for name, values in found.items() if values}
    if not way or len(found) < 2:
        return None
    first = max(found, key=lambda name: way * statistics.fmean(found[name]))
    ahead = all(_apart(found[first], values) for name, values in found.items() if name != first)
    return first if ahead else None


def arms(groups: Groups) -> dict[Name, Sequence[Row]]:
    """The groups that compete: not those of references alone."""
    return {name: rows for name, rows in groups.items() if any(row.get("arm") not in REFERENCES for row in rows)}


def _meant(groups: Groups, metric: str) -> int:
    """Which way the persona moves a trait as a prompt: 1, -1, or 0 when nobody measured it."""
    rows = [row for group in groups.values() for row in group]
    base, prompted = (_numbers([row for row in rows if row.get("arm") == name], metric) for name in REFERENCES)
    if not base or not prompted:
        return 0
    shift = statistics.fmean(prompted) - statistics.fmean(base)
    return (shift > 0) - (shift < 0)


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two means differ by more than the spread of either; a single row has no spread, so nothing is known."""
    if min(len(one), len(other)) < 2:
        return False
    return abs(statistics.fmean(one) - statistics.fmean(other)) > max(map(statistics.stdev, (one, other)))


def _broken(row: Row) -> bool:
    return (row.get("verdict") or "").startswith(("broken", "collapsed"))


def _numbers(rows: Sequence[Row], metric: str) -> list[float]:
    return [value for row in rows if (value := finite(row.get(metric, ""))) is not None]
