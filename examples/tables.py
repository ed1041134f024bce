"""The tables of docs/results.md from the ledger: `just tables`, or python examples/tables.py [--check].

A table stands in the page between <!-- table NAME --> and <!-- end -->, and NAME is one of TABLES below. Whatever is
between the marks is written anew; with --check nothing is written, and a table that differs is an error.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import data
import frontier
import headline
import matched
import robust
from study import ARMS

from shl import results
from shl.core.metrics import finite

Rows = list[results.Row]
Make = Callable[[Rows], str]
BLOCK = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
READ = ("auth_nats", "care_nats", "enact_authority", "broken", "free_ppl_p90", "informedness", "facts")
INSIDE = ("dose", "cos_v0", "student_cosine", "student_share")
SHORT = {
    "free_ppl_p90": "ppl p90",
    "informedness": "informed",
    "student_cosine": "cos student",
    "student_share": "share",
}
OTHER_TEXT = ("short@0.5-prompted", "short@0.5-selected")  # loops that no vector speaks in
SHOWN = ("0", "1", "2", "3", "5", "7", "9")  # of ten rounds
BRIEF = ("3", "9")  # where the whole table is folded away
LEAST = ("auth_nats", "enact_authority", "broken", "free_ppl_p90")  # and of its columns


def select(rows: Rows, **wanted: str) -> Rows:
    """Rows with scores that say this, each once, in the order of the ledger."""
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return [row for row in results.distinct(found) if row.get("p_ans_any")]


def means(rows: Iterable[results.Row], by: Sequence[str], metrics: Sequence[str]) -> str:
    """Mean ± standard deviation over seeds, a line for each group."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") or "-" for name in by), []).append(row)
    heads = [*by, *(SHORT.get(metric, metric).replace("enact_", "enacts ") for metric in metrics), "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, members in groups.items():
        cells = [results.spread([row.get(metric, "") for row in members]) for metric in metrics]
        seeds = ", ".join(sorted({row.get("seed", "") for row in members}))
        lines.append("| " + " | ".join([*name, *cells, seeds]) + " |")
    return "\n".join(lines)


# --- the tables ---


def u2(rows: Rows, study: str = "u2", second: bool = False) -> str:
    """The arms of the first round, or of the second, whose names hold a comma."""
    found = (row for row in unscaled(rows, study) if ("," in row["arm"]) is second)
    return means(found, ("arm",), READ)


def unscaled(rows: Rows, study: str) -> Rows:
    """Arms as they were trained, and plain training at every scale; the others' scales are a table of their own."""
    return [row for row in select(rows, study=study) if "@" not in row["arm"] or "nll@" in row["arm"]]


def u2_matched(rows: Rows, study: str = "u2") -> str:
    """Against scaled nll at the same trait, as examples/matched.py prints it."""
    by_arm: dict[str, dict[str, results.Row]] = {}
    for row in unscaled(rows, study):
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    tables = (matched.table(by_arm, "nll", "base", "auth_nats", metric) for metric in ("broken", "enact_authority"))
    return "\n\n".join("\n".join(lines) for lines in tables)


def frontier_scales(rows: Rows, study: str) -> str:
    """Shift and broken answers at each scale of each regulariser."""
    return frontier.by_scale(*frontier.frontiers(rows, study), "auth_nats", "broken")


def frontier_matched(rows: Rows, studies: Sequence[str], only: str = "") -> str:
    """Each regulariser's frontier against that of plain training, as examples/frontier.py prints it."""
    found, base = frontier.crossed(rows, studies)
    found = {arm: scales for arm, scales in found.items() if arm == "nll" or arm.endswith(only)}
    return frontier.against(found, base, "nll", "auth_nats", ("broken", "enact_authority"))


def rounds(rows: Rows, study: str, model: str, metrics: Sequence[str], shown: Sequence[str] = SHOWN) -> str:
    """References, then each arm round by round."""
    order = ("base", "prompted", *ARMS)
    mine = [row for row in select(rows, study=study, model=model) if not row.get("round") or row["round"] in shown]
    mine.sort(key=lambda row: (_place(row["arm"], order), row["arm"], int(row.get("round") or -1)))
    return means(mine, ("arm", "round"), metrics)


def _place(arm: str, order: Sequence[str]) -> int:
    """Where an arm stands; those without a place come last."""
    return order.index(arm) if arm in order else len(order)


def reach(rows: Rows, study: str, model: str, trait: str) -> str:
    """What examples/headline.py prints: reach and rounds survived of each arm."""
    controls, found = headline.controls_of(rows, "controls", model, trait), headline.Shifts(rows, study, model, trait)
    rivals = [arm for arm in OTHER_TEXT if arm in found.points]
    return headline.table(found, (*headline.AGAINST, *rivals), controls)


def kept_shift(rows: Rows) -> str:
    """The share of its shift that an arm keeps under a condition, from means over the seeds that it was read with."""
    metrics = ("auth_nats", "enact_authority")
    mine = select(rows, study="robust")

    def read(arm: str, seeds: set[str]) -> dict[str, dict[str, float]]:
        told: dict[str, dict[str, list[float]]] = {}
        for row in mine:
            if row["arm"] == arm and row["seed"] in seeds:
                for metric in metrics:
                    if (value := finite(row[metric])) is not None:
                        told.setdefault(row["condition"], {}).setdefault(metric, []).append(value)
        return {condition: {name: statistics.fmean(v) for name, v in one.items()} for condition, one in told.items()}

    lines: list[str] = []
    for arm in dict.fromkeys(row["arm"] for row in mine if row["arm"] != "base"):
        seeds = {row["seed"] for row in mine if row["arm"] == arm}
        found = robust.table({"base": read("base", seeds), arm: read(arm, seeds)}, metrics).splitlines()
        lines += found[2:] if lines else found
    return "\n".join(lines)


TABLES: dict[str, Make] = {
    "u2": u2,
    "u2-matched": u2_matched,
    "u2-frontier": partial(frontier_scales, study="u2"),
    "u2-frontier-matched": partial(frontier_matched, studies=("u2",)),
    "u2-filtered-frontier": partial(frontier_scales, study="u2-filtered"),
    "u2-filtered-frontier-matched": partial(frontier_matched, studies=("u2-filtered",)),
    "u2-crossed": partial(frontier_matched, studies=("u2", "u2-filtered"), only="-filtered"),
    "u2-second": partial(u2, second=True),
    "u2-filtered": partial(u2, study="u2-filtered"),
    **{
        f"{study}{name}{kind}": partial(rounds, study=study, model=model, metrics=metrics, shown=shown)
        for study in ("loops", "backtrack")
        for model, name, whole in (
            ("toy", "", (*READ, *INSIDE)),
            ("toy:rare", "-rare", READ),
            ("toy:never", "-never", READ),
        )
        for kind, shown, metrics in (("", SHOWN, whole), ("-brief", BRIEF, LEAST))
    },
    "reach": partial(reach, study="loops", model="toy", trait="auth_nats"),
    "reach-said": partial(reach, study="loops", model="toy", trait="enact_authority"),
    "backtrack-dev": partial(rounds, study="backtrack-dev", model="toy", metrics=READ),
    "backtrack-reach": partial(reach, study="backtrack", model="toy", trait="auth_nats"),
    "backtrack-reach-said": partial(reach, study="backtrack", model="toy", trait="enact_authority"),
    "controls": lambda rows: means(select(rows, study="controls"), ("arm",), READ),
    "robust": kept_shift,
    "robust-rows": lambda rows: means(select(rows, study="robust"), ("arm", "condition"), READ),
    "data": lambda rows: means(
        select(rows, study="data"),
        ("arm",),
        ("auth_nats", "enact_authority", "broken", "free_ppl_p90", "n_train", "kept", "data_broken", "data_enact"),
    ),
    "filter": lambda rows: means(
        select(rows, study="filter"),
        ("arm",),
        (
            "dose",
            "n_train",
            "data_broken",
            "auth_nats",
            "retain.auth_nats",
            "enact_authority",
            "broken",
            "free_ppl_p90",
        ),
    ),
    "price": partial(data.report_rows, study="price"),
    "online": partial(rounds, study="online", model="toy", metrics=(*READ, "generated", "steps", *INSIDE[:2])),
    **{
        f"{study}-{axis}{kind}": partial(
            rounds,
            study=f"{study}-{axis}",
            model="toy",
            metrics=(f"enact_{axis}", f"agree_{axis}", "broken", "free_ppl_p90", "auth_nats", "facts"),
            shown=shown,
        )
        for study in ("loops", "backtrack")
        for axis in ("boldness", "humanity")
        for kind, shown in (("", SHOWN), ("-brief", BRIEF))
    },
}


def written(page: str, rows: Rows) -> str:
    """The page with every table made anew."""

    def anew(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        if name not in TABLES:
            raise SystemExit(f"tables: there is no table {name}; known are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](rows)}\n{end}"

    return BLOCK.sub(anew, page)


def main() -> int:
    """Command line; exit code 1 when --check finds a table that the ledger no longer says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, default=Path("results.tsv"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a table differs")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    new = written(page, results.read_rows(args.ledger))
    if not args.check:
        args.page.write_text(new, encoding="utf-8")
    elif new != page:
        print(f"tables: {args.page} does not show what {args.ledger} says; run: just tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
